"""Whether what MILA gives is what the neck or the heads take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mila_mm.arch import resolve_arch
from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.data.splits import kind_name

# Necks that take the maps of a backbone as they are, one number of channels each.
_NECKS = ('FPN', 'PAFPN', 'BiFPN', 'CARAFE', 'ChannelMapper', 'FPG', 'NASFCOS_FPN', 'NASFPN', 'HRFPN', 'RFP',
          'CSPNeXtPAFPN', 'YOLOXPAFPN', 'CTResNetNeck', 'MultiLevelNeck', 'Feature2Pyramid', 'ICNeck', 'MLANeck', 'JPU',
          'MSDeformAttnPixelDecoder')  # fmt: skip


def check_channels(model: dict[str, Any]) -> list[Finding]:
    """Check ``in_channels`` of neck and heads against the maps of MILA.

    Other backbones say what they give only once they have run, see ``rehearsal.py``. What a pyramid gives is compared
    with what the heads of a detector take.

    Args:
        model: Config of a model.
    """
    backbone = model.get('backbone')
    behind = _behind_pyramid(model)
    if not isinstance(backbone, dict) or kind_name(backbone) != 'MILA':
        return behind
    try:
        dims = resolve_arch(backbone.get('arch', 'tiny')).dims
    except (ValueError, TypeError) as fault:
        return [error('model.backbone', str(fault))]
    try:
        given = [dims[index] for index in backbone.get('out_indices', (0, 1, 2, 3))]
    except (TypeError, IndexError):
        return behind  # building the model says what is wrong with them
    arch = backbone.get('arch', 'tiny')
    return check_given(model, given, f'MILA {arch}' if isinstance(arch, str) else f'MILA {dict(arch)}') or behind


def _behind_pyramid(model: dict[str, Any]) -> list[Finding]:
    """Check what heads and extractors take of a plain pyramid, all of whose maps are of one width."""
    neck, roi_head = model.get('neck'), model.get('roi_head')
    if (
        not isinstance(neck, dict)
        or kind_name(neck) not in ('FPN', 'PAFPN')
        or not isinstance(neck.get('out_channels'), int)
    ):
        return []
    parts = [('model.rpn_head', 'in_channels', model.get('rpn_head'), ('RPNHead',))]
    if (
        isinstance(roi_head, dict)
        and kind_name(roi_head) in ('StandardRoIHead', 'CascadeRoIHead')
        and 'shared_head' not in roi_head
    ):
        for name, key, kinds in _OF_REGIONS:
            several = roi_head.get(name)
            if isinstance(several, (list, tuple)):
                parts += [(f'model.roi_head.{name}.{i}', key, each, kinds) for i, each in enumerate(several)]
            else:
                parts.append((f'model.roi_head.{name}', key, several, kinds))
    given = neck['out_channels']
    wrong = [
        (f'{where}.{key}', part[key])
        for where, key, part, kinds in parts
        if isinstance(part, dict) and kind_name(part) in kinds and isinstance(part.get(key), int) and part[key] != given
    ]
    return [
        error(key, f'is {takes}, but model.neck gives maps of {given} channels; --cfg-options {key}={given}')
        for key, takes in dict(wrong).items()
    ]


# Parts of a head of regions that take maps of a pyramid as they are, by which argument, and their usual classes.
_OF_REGIONS = (
    ('bbox_roi_extractor', 'out_channels', ('SingleRoIExtractor',)),
    ('mask_roi_extractor', 'out_channels', ('SingleRoIExtractor',)),
    ('bbox_head', 'in_channels', ('Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'ConvFCBBoxHead')),
    ('mask_head', 'in_channels', ('FCNMaskHead',)),
)


def check_given(model: dict[str, Any], given: Sequence[int], name: str) -> list[Finding]:
    """Check ``in_channels`` of what comes after a backbone.

    Args:
        model: Config of a model.
        given: Channels of each map of the backbone.
        name: What it is called in messages.
    """
    if isinstance(model.get('neck'), dict):
        return _neck(model['neck'], given, name)
    if isinstance(model.get('neck'), (list, tuple)) and model['neck'] and isinstance(model['neck'][0], dict):
        return _neck(model['neck'][0], given, name, 'model.neck.0')
    findings = []
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key)
        for index, head in enumerate(heads if isinstance(heads, (list, tuple)) else [heads]):
            if isinstance(head, dict):
                where = f'model.{key}.{index}' if isinstance(heads, (list, tuple)) else f'model.{key}'
                first = index == 0 or key == 'auxiliary_head'
                findings += _head(head, given, name, where) if first else []
    return findings


def _neck(neck: dict[str, Any], given: Sequence[int], name: str, key: str = 'model.neck') -> list[Finding]:
    takes = neck.get('in_channels')
    if kind_name(neck) not in _NECKS or not isinstance(takes, (list, tuple)) or list(takes) == list(given):
        return []
    return [error(f'{key}.in_channels', _says(takes, given, name, f'{key}.in_channels'))]


def _head(head: dict[str, Any], given: Sequence[int], name: str, key: str) -> list[Finding]:
    takes, index = head.get('in_channels'), head.get('in_index', -1)
    try:
        if isinstance(takes, (list, tuple)) and isinstance(index, (list, tuple)):
            wanted: Any = [given[i] for i in index]
            takes = list(takes)
        elif isinstance(takes, int) and isinstance(index, int):
            wanted = given[index]
        else:
            return []
    except IndexError:
        return [error(f'{key}.in_index', f'is {index}, but {name} gives {len(given)} maps')]
    return [] if takes == wanted else [error(f'{key}.in_channels', _says(takes, wanted, name, f'{key}.in_channels'))]


def _says(takes: Any, given: Any, name: str, key: str) -> str:
    said = ', '.join(map(str, takes)) if isinstance(takes, (list, tuple)) else str(takes)
    gives = ', '.join(map(str, given)) if isinstance(given, (list, tuple)) else str(given)
    return f'{name} gives {gives}, but {key} is {said}; --cfg-options {key}="{_option(given)}"'


def _option(given: Any) -> str:
    return str(list(given)).replace(' ', '') if isinstance(given, (list, tuple)) else str(given)
