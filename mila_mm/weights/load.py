"""Putting weights into a model completely, or saying why that cannot be."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mila_mm.weights import names
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.sharded import read_path
from mila_mm.weights.report import LoadReport, MismatchError, advice, listed
from mila_mm.weights.source.fetching import local_path
from mila_mm.weights.source.published import SCHEME

_FRESH_NORMS = 'an ImageNet classifier has no norms of its stages; they start at weight 1, bias 0 and are trained'
_FRESH_COUNTS = 'files of old PyTorch do not count batches'
_COUNT = '.num_batches_tracked'
_NOT_BUILT = 'stages and output norms that out_indices leaves out'
_HEADS = 'the parts of the model around the backbone'


def read_checkpoint(
    source: str | Path, map_location: Any = 'cpu', *, key: str | None = None, mmap: bool | None = None
) -> dict[str, Any]:
    """Read weights by name, address or path, under the names of this package.

    Args:
        source: ``mila://name``, an http(s) address, a ``.pth`` or ``.safetensors`` file, or a folder that several
            processes have written together.
        map_location: As for :func:`torch.load`. Defaults to the CPU.
        key: The entry that holds the state dict. Defaults to the first of ``state_dict``, ``model`` and
            ``state_dict_ema`` that there is.
        mmap: Map the file instead of copying it, see :func:`mila_mm.weights.read_file`. Defaults to None: where it is
            named, as files in the cache are replaced and never written to.

    Returns:
        The file's other entries, ``state_dict`` with our names, ``dropped`` (reason -> keys left out) and ``meta``.
        What mmengine would execute of a file's meta data, its ``config``, is renamed to ``config_text``.

    Raises:
        FileNotFoundError: If a path does not exist.
        CheckpointError: If it is no checkpoint, damaged, unsafe, or holds no weights.
        DownloadError: If it cannot be fetched.
    """
    mmap = str(source).startswith(SCHEME) if mmap is None else mmap
    content = disarm(read_path(local_path(str(source)), map_location, mmap=mmap))
    state_dict, layout = names.unwrap(content, key=key, source=str(source))
    tensors, dropped = names.to_project(state_dict)
    rest = {name: value for name, value in content.items() if name != layout} if layout else {}
    return {'meta': {}, **rest, 'state_dict': tensors, 'dropped': dropped}


def disarm(content: Any) -> Any:
    """Rename the entry of a checkpoint that mmengine's ``Runner.resume`` executes as Python.

    Checkpoints of mmdet 2 and mmseg 0 keep their config as text in ``meta['config']``; to compare the
    number of GPUs, mmengine runs that text.

    Returns:
        The same, with ``meta['config']`` as ``meta['config_text']``.
    """
    if isinstance(content, dict) and isinstance(content.get('meta'), dict) and 'config' in content['meta']:
        meta = dict(content['meta'])
        meta['config_text'] = meta.pop('config')
        return {**content, 'meta': meta}
    return content


def load_backbone(
    backbone: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    prefix: str | None = None,
    strict: bool = True,
    adapt_in_channels: bool = False,
    key: str | None = None,
    label: str | None = None,
) -> LoadReport:
    """Load a MILA backbone from an ImageNet classifier, another backbone, a detector or a segmentor.

    Args:
        source: A name, address or path, or what :func:`read_checkpoint` returned.
        prefix: What stands before the backbone's keys. Defaults to what the file itself shows.
        strict: Raise on anything unexplained; ``False`` loads what fits and reports the rest.
        adapt_in_channels: Change the stem's first convolution to the model's number of input channels.
        key: See :func:`read_checkpoint`.
        label: What messages call the source. Defaults to the source itself.

    Returns:
        The report, already logged.

    Raises:
        MismatchError: If ``strict`` and a key is missing or unexpected, or a shape differs.
        CheckpointError: If the file cannot be used.
    """
    checkpoint, label = _read(source, key, label)
    tensors = checkpoint['state_dict']
    report = LoadReport(label, dropped={why: list(keys) for why, keys in checkpoint.get('dropped', {}).items()})
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith('.') else prefix + '.'
        if not any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(f'{label}: no key starts with {prefix!r}; keys are {listed(tensors, 3)}')
    else:
        prefix = names.backbone_prefix(tensors) or ''
    if prefix:
        others = [name for name in tensors if not name.startswith(prefix)]
        if others:
            report.dropped[_HEADS] = others
        tensors = OrderedDict(
            (name[len(prefix) :], value) for name, value in tensors.items() if name.startswith(prefix)
        )
    own = backbone.state_dict()
    leftovers = [name for name in tensors if names.is_classifier_leftover(name) and name not in own]
    if leftovers:
        report.dropped[names.CLASSIFIER_REASON] = leftovers
        tensors = OrderedDict((name, value) for name, value in tensors.items() if name not in set(leftovers))
    norms = [name for name in own if re.fullmatch(r'norm\d+\.(weight|bias)', name)]
    if norms and not any(name in tensors for name in norms):
        report.fresh[_FRESH_NORMS] = norms
    return _load(backbone, tensors, report, strict, adapt_in_channels)


def load_model(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    adapt_in_channels: bool = False,
    key: str | None = None,
    label: str | None = None,
) -> LoadReport:
    """Load a whole detector, segmentor or any other model.

    The other arguments are those of :func:`load_backbone`.

    Args:
        model: The model; wrappers for distributed training and test-time augmentation are looked through.

    Returns:
        The report, already logged.

    Raises:
        MismatchError: If ``strict`` and a key is missing or unexpected, or a shape differs.
        CheckpointError: If the file cannot be used.
    """
    checkpoint, label = _read(source, key, label)
    report = LoadReport(label, dropped={why: list(keys) for why, keys in checkpoint.get('dropped', {}).items()})
    return _load(_inner(model), checkpoint['state_dict'], report, strict, adapt_in_channels)


def _read(source: str | Path | Mapping[str, Any], key: str | None, label: str | None) -> tuple[Mapping[str, Any], str]:
    if not isinstance(source, Mapping):
        return read_checkpoint(source, key=key), label or str(source)
    label = label or 'checkpoint'
    state_dict, _ = names.unwrap(source, key=key, source=label)
    tensors, dropped = names.to_project(state_dict)
    known = source.get('dropped')
    known = known if isinstance(known, Mapping) else {}
    return {'state_dict': tensors, 'dropped': {**known, **dropped}}, label


def _inner(model: nn.Module) -> nn.Module:
    if 'mmengine' not in sys.modules:  # then nothing has wrapped the model: a classifier in plain timm
        return model
    from mmengine.model import BaseTTAModel, is_model_wrapper

    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _load(module: nn.Module, tensors: Mapping[str, Any], report: LoadReport, strict: bool, adapt: bool) -> LoadReport:
    """Match, load, log; raise where strict."""
    own = module.state_dict()
    fitting = names.with_versions(OrderedDict(tensors), tensors)
    _drop_not_built(module, fitting, own, report)
    for name in [name for name in fitting if name in own]:
        if adapt and name.endswith(names.STEM):
            fitting[name] = _adapt_stem(fitting[name], own[name], name, report)
        problem = _compare(fitting[name], own[name], name, report)
        if problem:
            report.mismatched.append(f'{name}: {problem}')
            del fitting[name]
    report.nonfinite = [name for name, value in fitting.items() if isinstance(value, Tensor) and not is_finite(value)]
    explained = {name for keys in report.fresh.values() for name in keys}
    # Modules rename keys of their older versions while they load, so only a load tells what is missing; where names
    # alone leave a doubt, the model's own values are kept to put them back if the file is refused.
    doubt = (
        report.mismatched
        or any(name not in own for name in fitting)
        or any(name not in fitting and name not in explained and not name.endswith(_COUNT) for name in own)
    )
    before = _snapshot(own) if doubt or (strict and _lacks_some_counts(own, fitting)) else None
    try:
        missing, unexpected = module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        if before is not None:
            module.load_state_dict(before)
        raise MismatchError(f'{report.source}: does not fit the model: {error}', report) from error
    explained.update(entry.partition(': ')[0] for entry in report.mismatched)
    # BatchNorm itself fills in a count that a file lacks, and reports nothing
    counts = [name for name in own if name.endswith(_COUNT) and name not in tensors]
    if counts and not any(name.endswith(_COUNT) for name in tensors):
        report.fresh[_FRESH_COUNTS] = counts
        explained.update(counts)
    report.missing = [name for name in dict.fromkeys([*missing, *counts]) if name not in explained]
    report.unexpected = list(unexpected)
    report.loaded = len(fitting) - len(unexpected)
    if strict and not report.complete and before is not None:
        module.load_state_dict(before)
    _tell(module, tensors, own, report, strict)
    return report


def _lacks_some_counts(own: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    """Tell whether a file counts batches for some BatchNorms and not for others, which is refused."""
    have = [name in tensors for name in own if name.endswith(_COUNT)]
    return any(have) and not all(have)


def _snapshot(own: Mapping[str, Any]) -> OrderedDict:
    """Copy a state dict, which shares its memory with the model."""
    return names.with_versions(OrderedDict((name, copy.deepcopy(value)) for name, value in own.items()), own)


def _compare(value: Any, target: Any, name: str, report: LoadReport) -> str:
    """Return why a value cannot be copied into its target, or ''."""
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return ''
    if value.shape != target.shape:
        return f'file {tuple(value.shape)}, model {tuple(target.shape)}'
    if value.dtype != target.dtype:
        if not (value.is_floating_point() and target.is_floating_point()):
            return f'file {str(value.dtype)[6:]}, model {str(target.dtype)[6:]}'
        report.cast.append(f'{name}: {str(value.dtype)[6:]}')
    return ''


def is_finite(value: Tensor) -> bool:
    """Tell whether there is neither NaN nor infinity; a sum shows most that are clean in one cheap pass.

    Args:
        value: Any tensor.

    Returns:
        True for tensors of integers.
    """
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # torch does not add in 8 bits
    if not (value.is_floating_point() or value.is_complex()) or value.is_meta:
        return True
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _drop_not_built(module: nn.Module, tensors: OrderedDict, own: Mapping[str, Any], report: LoadReport) -> None:
    """Drop the stages and output norms that ``out_indices`` leaves out, where the arch has them."""
    prefix = names.backbone_prefix(own)
    if prefix is None:
        return
    backbone = module.get_submodule(prefix.rstrip('.')) if prefix else module
    stages = len(getattr(backbone, 'dims', ()))
    built = 1 + max(
        (int(m[1]) for m in (re.match(re.escape(prefix) + r'layers\.(\d+)\.', key) for key in own) if m), default=-1
    )
    pattern = re.compile(re.escape(prefix) + r'(?:norm(\d+)\.|layers\.(\d+)\.(downsample\.)?)')
    unused = []
    for key in tensors:
        match = pattern.match(key)
        if match is None or key in own or int(match[1] or match[2]) >= stages:
            continue
        if match[1]:
            idle = f'{prefix}norm{match[1]}.weight' not in own
        else:
            idle = int(match[2]) >= built or (match[3] is not None and int(match[2]) == built - 1)
        if idle:
            unused.append(key)
    if unused:
        report.dropped[_NOT_BUILT] = unused
        for key in unused:
            del tensors[key]


def _adapt_stem(value: Tensor, target: Tensor, name: str, report: LoadReport) -> Tensor:
    """Repeat the stem's input channels to the model's number, keeping the response to grey images."""
    if value.dim() != 4 or value.shape[1] == target.shape[1] or value.shape[0] != target.shape[0]:
        return value
    have, want = value.shape[1], target.shape[1]
    index = torch.arange(want) % have
    shares = torch.bincount(index, minlength=have).to(value.dtype)
    if want < have:
        # fewer channels: each takes the mean response of all
        adapted = value.mean(1, keepdim=True).repeat(1, want, 1, 1) * (have / want)
    else:
        adapted = value[:, index] / shares[index].view(1, -1, 1, 1)
    report.adapted.append(f'{name}: {have} to {want} input channels')
    return adapted


def _tell(
    module: nn.Module, tensors: Mapping[str, Any], own: Mapping[str, Any], report: LoadReport, strict: bool
) -> None:
    """Log the report; raise where strict and something is unexplained."""
    if not report.complete and strict:
        raise MismatchError(
            f'{report.source}: does not fit the model.\n'
            + '\n'.join(report.problems())
            + f'\n{advice(report, tensors, own)}',
            report,
        )
    _log(f'{report.source}: {report}', logging.INFO if report.complete else logging.WARNING)
    if report.nonfinite:
        _log(
            f'{report.source}: {len(report.nonfinite)} tensors hold NaN or infinity: {listed(report.nonfinite)}; '
            'outputs will be NaN',
            logging.WARNING,
        )


def _log(message: str, level: int) -> None:
    """Write to mmengine's current log, or to Python's where mmengine has no part in the program."""
    if 'mmengine' not in sys.modules:
        logging.getLogger('mila_mm').log(level, message)
        return
    from mmengine.logging import print_log

    print_log(message, logger='current', level=level)
