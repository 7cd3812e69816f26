"""Whether the heads of a model fit the classes of its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.registry import MODELS

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.data.kinds import Kind, default_of, find_kind, names_of
from mila_mm.engine.data.splits import Split, kind_name, resolve

# Numbers of classes that are not those of the data set: object or not, other tasks, other models inside.
_OTHER_COUNTS = ('rpn_head', 'reid', 'language_model', 'backbone', 'neck', 'data_preprocessor', 'motion')
# STDC's detail head tells edges from the rest; the semantic heads learn from maps with classes of their own.
_OTHER_HEADS = ('STDCHead', 'RPNHead', 'FusedSemanticHead', 'SCNetSemanticHead')
# Models that compare with text have as many classes as they are asked for.
_TEXT_MODELS = ('GLIP', 'GroundingDINO', 'MultimodalEncoderDecoder', 'SideAdapterCLIPHead')


def check_heads(model: dict[str, Any], split: Split, scope: str) -> list[Finding]:
    """Check every number of classes in a model against a data set, defaults of the classes of heads included.

    Args:
        model: Config of the model.
        split: The data set, with known classes.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        One finding that names all heads that do not fit and the options that mend it, and others about class weights.
    """
    classes = split.classes
    if not classes:
        return []
    things = _count(split, 'thing_classes')
    stuff = _count(split, 'stuff_classes')
    of_panoptic = things is not None and stuff is not None and things + stuff == len(classes)
    expected = {'num_classes': things if of_panoptic else len(classes)}
    if scope == 'mmdet':  # where mmseg borrows these heads, it counts by num_classes
        expected['num_things_classes'] = things if of_panoptic else len(classes)
        if of_panoptic:
            expected['num_stuff_classes'] = stuff
    wrong: list[tuple[str, int, int]] = []
    findings: list[Finding] = []
    for key, part in _parts(model, 'model'):
        kind = _kind_of(part, split, scope)
        if kind_name(part) in _OTHER_HEADS:
            continue
        for name, number in expected.items():
            got = part.get(name, default_of(kind, name))
            if isinstance(got, (str, float)) and not isinstance(got, bool):
                findings.append(error(f'{key}.{name}', f'is {got!r}, expected a whole number: {number}'))
            elif isinstance(got, int) and got != number and not (got == 0 and name == 'num_stuff_classes'):
                wrong.append((f'{key}.{name}', got, number))
        findings += _class_weights(key, part, len(classes))
        if scope == 'mmseg':
            findings += _one_class(key, part, kind)
    if wrong:
        findings.insert(0, _wrong_numbers(wrong, split))
    return findings


def stuff_of(model: dict[str, Any]) -> tuple[str, ...]:
    """Return names for what the semantic branch of a cascade tells apart in maps of its own, () where it has none."""
    head = (model.get('roi_head') or {}).get('semantic_head') if isinstance(model.get('roi_head'), dict) else None
    if not isinstance(head, dict):
        return ()
    number = head.get('num_classes', default_of(resolve(MODELS, head.get('type'), 'mmdet'), 'num_classes'))
    return tuple(f'label {label}' for label in range(number)) if isinstance(number, int) else ()


def _kind_of(part: dict[str, Any], split: Split, scope: str) -> Kind | None:
    """Return the class of a part of the model, found as that of the data set was."""
    if isinstance(split.kind, type):
        return resolve(MODELS, part.get('type'), scope)
    return find_kind('MODELS', part, scope) if split.kind is not None else None


def reads_text(model: dict[str, Any]) -> bool:
    """Tell whether a model's classes are words that it is given, whatever their number."""
    return any(kind_name(part).startswith(_TEXT_MODELS) for _, part in _parts(model, 'model'))


def _count(split: Split, name: str) -> int | None:
    own = split.config.get('metainfo')
    own = own if isinstance(own, dict) else {}
    names = own.get(name, None if 'classes' in own else split.meta.get(name.upper(), split.meta.get(name)))
    return len(names) if isinstance(names, (list, tuple)) else None


def _wrong_numbers(wrong: Sequence[tuple[str, int, int]], split: Split) -> Finding:
    options = ' '.join(f'{key}={number}' for key, _, number in wrong[:12])
    numbers = sorted({got for _, got, _ in wrong})
    said = ', '.join(f'{key} is {got}' for key, got, _ in wrong[:3])
    more = f' and {len(wrong) - 3} more are of {", ".join(map(str, numbers))}' if len(wrong) > 3 else ''
    return error(
        said + more,
        f'{split.key} has {len(split.classes or ())} classes; --cfg-options {options}',
    )


def _parts(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through a model's config to every part with a type, except where classes are not the data set's."""
    if isinstance(node, dict):
        if 'type' in node:
            yield key, node
        for name, value in node.items():
            if name not in _OTHER_COUNTS:
                yield from _parts(value, f'{key}.{name}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _parts(value, f'{key}.{index}')


def _class_weights(key: str, part: dict[str, Any], classes: int) -> list[Finding]:
    """Check the lengths of lists of class weights: heads with a query for no object have one more."""
    is_query_head = any(name in kind_name(part) for name in ('MaskFormer', 'Mask2Former'))
    findings = []
    for loss_name in ('loss_cls', 'loss_decode'):
        for loss in part.get(loss_name) if isinstance(part.get(loss_name), (list, tuple)) else [part.get(loss_name)]:
            weights = loss.get('class_weight') if isinstance(loss, dict) else None
            if not isinstance(weights, (list, tuple)):
                continue
            if loss_name == 'loss_cls' and not is_query_head:
                continue
            expected = classes + (loss_name == 'loss_cls')
            if len(weights) != expected:
                extra = ' (the last one is for no object)' if loss_name == 'loss_cls' else ''
                findings.append(
                    error(
                        f'{key}.{loss_name}.class_weight',
                        f'has {len(weights)} weights, {classes} classes need {expected}{extra}',
                    )
                )
    return findings


def _one_class(key: str, part: dict[str, Any], kind: Kind | None) -> list[Finding]:
    """Refuse a softmax over one class: it is always right, nothing is learnt and mIoU is 100."""
    if part.get('num_classes') != 1 or 'BaseDecodeHead' not in names_of(kind) or 'Former' in kind_name(part):
        return []
    losses = part.get('loss_decode') or dict(type='CrossEntropyLoss', use_sigmoid=False)
    losses = losses if isinstance(losses, (list, tuple)) else [losses]
    softmax = [loss for loss in losses if kind_name(loss) == 'CrossEntropyLoss' and not loss.get('use_sigmoid')]
    if not softmax:
        return []
    return [
        error(
            f'{key}.num_classes',
            'is 1 with a softmax, which is always right: nothing is learnt and mIoU is 100. Name the background as a '
            "class of its own: classes=('background', ...), num_classes=2",
        )
    ]
