"""The switches of the study as one checked value, and its rows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mila_mm.arch import ARCHS, Arch

NAME = 'LinearAttentionTransformer'
LAYOUTS = ('swin', 'mila')
BLOCKS = ('transformer', 'mamba', 'mila')
ENCODINGS = ('ape', 'lepe', 'cpe', 'rope')

SWIN_ARCHS: Mapping[str, Arch] = {
    'nano': ARCHS['nano'],  # not in the paper, for demos and tests
    'tiny': Arch(96, (2, 2, 6, 2), (3, 6, 12, 24)),  # Swin-T
}


@dataclass(frozen=True)
class Design:
    """What a linear attention Transformer takes over from Mamba (arXiv 2405.16605, section 4).

    Attributes:
        block: 'transformer', 'mamba' (the whole block is Mamba's, no MLP) or 'mila' (its attention half only).
        input_gate: Whether v is multiplied by Delta.
        forget_gate: Whether the state decays by exp(a * Delta), which makes the attention causal and recurrent.
        shortcut: Whether D * x is added.
        normalization: Whether the attention is divided by the sum of its weights.
        single_head: Whether there is one head of the width that one of several would have.
        positional_encoding: Any of 'ape', 'lepe', 'cpe' and 'rope'.
        expansion: E, width inside of Mamba's block over that of the tokens.
        qk_ratio: Width of q, and of k, over that of the tokens.
        conv_kernel_size: Side of the depthwise convolution in Mamba's block.
        gate_reduction: Width of the tokens over that inside of the projection to Delta.
    """

    block: str
    input_gate: bool
    forget_gate: bool
    shortcut: bool
    normalization: bool
    single_head: bool
    positional_encoding: frozenset[str]
    expansion: float
    qk_ratio: float
    conv_kernel_size: int
    gate_reduction: int

    @property
    def gated(self) -> bool:
        """Whether there is anything in the operator that plain linear attention does not have."""
        return self.input_gate or self.forget_gate or self.shortcut or not self.normalization


def resolve_design(
    block: str,
    positional_encoding: str | Sequence[str],
    expansion: float | None,
    qk_ratio: float | None,
    conv_kernel_size: int,
    gate_reduction: int,
    **switches: bool,
) -> Design:
    """Fill in what depends on the block, and check.

    Args:
        block: One of :data:`BLOCKS`.
        positional_encoding: One or several of :data:`ENCODINGS`.
        expansion: None for 2 in 'mamba' and 1 elsewhere.
        qk_ratio: None for 1.5 in 'mamba', the expansion elsewhere.
        conv_kernel_size: An odd number.
        gate_reduction: At least 1.
        **switches: The other attributes of :class:`Design`.

    Raises:
        ValueError: For an unknown name or a number that makes no model.
    """

    def fail(expected: str, got: object) -> None:
        raise ValueError(f'{NAME}: expected {expected}, got {got!r}')

    encodings = (positional_encoding,) if isinstance(positional_encoding, str) else tuple(positional_encoding)
    if block not in BLOCKS:
        fail(f'block to be one of {", ".join(BLOCKS)}', block)
    if not set(encodings) <= set(ENCODINGS):
        fail(f'positional_encoding to be any of {", ".join(ENCODINGS)}', positional_encoding)
    if block == 'transformer' and expansion is not None:
        fail("no expansion with block 'transformer', whose width is that of the tokens", expansion)
    expansion = (2.0 if block == 'mamba' else 1.0) if expansion is None else expansion
    qk_ratio = (1.5 if block == 'mamba' else expansion) if qk_ratio is None else qk_ratio
    if expansion <= 0 or qk_ratio <= 0:
        fail('expansion and qk_ratio above 0', (expansion, qk_ratio))
    if conv_kernel_size < 1 or conv_kernel_size % 2 == 0:
        fail('conv_kernel_size to be an odd number', conv_kernel_size)
    if gate_reduction < 1:
        fail('gate_reduction of at least 1', gate_reduction)
    return Design(
        block=block,
        positional_encoding=frozenset(encodings),
        expansion=expansion,
        qk_ratio=qk_ratio,
        conv_kernel_size=conv_kernel_size,
        gate_reduction=gate_reduction,
        **switches,
    )


def _row(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType(options)


# conv_kernel_size=5 and, in 'mamba', qk_ratio=1.5 are left open by the paper; they give its costs (docs/study.md).
STUDY_ROWS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        'baseline': _row(),
        'input_gate': _row(input_gate=True),
        'forget_gate': _row(forget_gate=True),
        'shortcut': _row(shortcut=True),
        'no_normalization': _row(normalization=False),
        'single_head': _row(single_head=True),
        'block_all': _row(block='mamba', conv_kernel_size=5),
        'block_substitute': _row(block='mila', conv_kernel_size=5),
        'ape': _row(positional_encoding='ape'),
        'lepe': _row(positional_encoding='lepe'),
        'cpe': _row(positional_encoding='cpe'),
        'rope': _row(positional_encoding='rope'),
        'lepe_cpe_rope': _row(positional_encoding=('lepe', 'cpe', 'rope')),
    }
)
"""Options of :class:`mila_mm.LinearAttentionTransformer` by row: tables 1 and 2 of the paper, and MILA's encodings."""
