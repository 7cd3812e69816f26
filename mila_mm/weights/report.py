"""What became of each tensor of a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mila_mm.errors import printable
from mila_mm.weights import names
from mila_mm.weights.errors import CheckpointError

_SHOWN = 6


def listed(keys: Iterable[str], shown: int = _SHOWN) -> str:
    """Join names, shortening long lists.

    Returns:
        'a, b, ... 3 more'.
    """
    keys = list(keys)
    more = f', ... {len(keys) - shown} more' if len(keys) > shown else ''
    return ', '.join(printable(key) for key in keys[:shown]) + more


@dataclass
class LoadReport:
    """How weights fitted a model.

    Attributes:
        source: Where they came from.
        loaded: Number of tensors that went into the model.
        fresh: Reason -> keys of the model that keep their initial values, as they should.
        dropped: Reason -> keys of the file that the model has no use for, as is known.
        cast: Keys stored in another floating dtype, as 'KEY: DTYPE'.
        adapted: Keys changed because the caller asked for it, as 'KEY: WHAT'.
        nonfinite: Keys with NaN or infinite values.
        missing: Keys of the model that the file lacks, unexplained.
        unexpected: Keys of the file that the model lacks, unexplained.
        mismatched: Keys of another shape or kind, as 'KEY: file WHAT, model WHAT'.
    """

    source: str
    loaded: int = 0
    fresh: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    cast: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything matched or is explained."""
        return not (self.missing or self.unexpected or self.mismatched)

    def problems(self) -> list[str]:
        """Return what did not match, a line for each kind."""
        return [
            f'{len(keys)} {what}: {listed(keys)}'
            for what, keys in (
                ('missing', self.missing),
                ('unexpected', self.unexpected),
                ('of another shape or type', self.mismatched),
            )
            if keys
        ]

    def __str__(self) -> str:
        parts = [f'{self.loaded} tensors loaded']
        parts += [f'{len(keys)} start fresh ({listed(keys, 2)}): {why}' for why, keys in self.fresh.items()]
        parts += [f'{len(keys)} not needed ({listed(keys, 2)}): {why}' for why, keys in self.dropped.items()]
        parts += [f'{len(self.cast)} cast ({listed(self.cast, 2)})'] if self.cast else []
        parts += [f'adapted {listed(self.adapted)}'] if self.adapted else []
        return '; '.join(parts + self.problems())


class MismatchError(CheckpointError):
    """Weights that do not fit the model.

    Attributes:
        report: What matched and what did not, in full (the message shortens long lists).
    """

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def advice(report: LoadReport, tensors: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say what to do about weights that do not fit.

    Returns:
        One sentence.
    """
    theirs, ours = names.backbone_prefix(tensors), names.backbone_prefix(own)
    if theirs is None and ours is not None:
        return 'There is no MILA in the file; is it of another model?'
    if theirs == '' and ours:
        return (
            'The file holds a backbone only: give it to the backbone, '
            "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...), not to load_from."
        )
    stem = [entry for entry in report.mismatched if entry.partition(': ')[0].endswith(names.STEM)]
    if stem and len(stem) == len(report.problems()) == len(report.mismatched):
        return 'Only the number of input channels differs: adapt_in_channels=True converts the stem.'
    if theirs is not None and ours is not None:
        file_arch, model_arch = names.describe(tensors, theirs), names.describe(own, ours)
        if file_arch != model_arch:
            return f'The file is of {file_arch}, the model is {model_arch}.'
    return (
        'If the difference is meant (another number of classes, say), load_strict=False takes what fits '
        '(--cfg-options load_strict=False).'
    )
