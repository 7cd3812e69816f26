"""The architectures of MILA by name, and the check of a custom one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True)
class Arch:
    """What distinguishes one MILA from another.

    Attributes:
        embed_dim: Width of the first stage; each further stage doubles it.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


ARCHS: Mapping[str, Arch] = {
    # Not in the paper: small enough to train on a CPU, for demos and tests.
    'nano': Arch(32, (1, 1, 2, 1), (1, 2, 4, 8)),
    # MILA, arXiv 2405.16605, appendix (there MLLA-T, -S and -B).
    'tiny': Arch(64, (2, 4, 8, 4), (2, 4, 8, 16)),
    'small': Arch(64, (3, 6, 21, 6), (2, 4, 8, 16)),
    'base': Arch(96, (3, 6, 21, 6), (3, 6, 12, 24)),
}

_FIELDS = ('embed_dim', 'depths', 'num_heads')


def _is_counts(value: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(v, int) and v > 0 for v in value)
    )


def resolve_arch(arch: str | Mapping[str, object], archs: Mapping[str, Arch] = ARCHS, model: str = 'MILA') -> Arch:
    """Turn a name or a mapping into a checked :class:`Arch`.

    Args:
        arch: A key of ``archs``, or a mapping with ``embed_dim`` (int) and ``depths`` and ``num_heads`` (one int for
            each stage).
        archs: The architectures that have a name.
        model: What messages call the model.

    Raises:
        ValueError: An unknown name, missing or unknown fields, or numbers that make no model.
    """
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(
                f'{model}: expected arch to be one of {", ".join(archs)} or a dict of '
                f'{", ".join(_FIELDS)}; got {arch!r}'
            )
        return archs[arch]
    if not isinstance(arch, Mapping) or set(arch) != set(_FIELDS):
        got = sorted(map(str, arch)) if isinstance(arch, Mapping) else arch
        raise ValueError(f'{model}: expected arch to be a name or a dict of exactly {", ".join(_FIELDS)}; got {got!r}')
    width, depths, heads = (arch[field] for field in _FIELDS)
    if not isinstance(width, int) or width <= 0 or width % 4:
        raise ValueError(
            f'{model}: expected embed_dim to be a positive multiple of 4 (RoPE turns pairs of channels on '
            f'two axes); got {width!r}'
        )
    if not (_is_counts(depths) and _is_counts(heads) and len(depths) == len(heads)):
        raise ValueError(
            f'{model}: expected depths and num_heads to be positive integers, one for each stage; '
            f'got depths={depths!r}, num_heads={heads!r}'
        )
    result = Arch(width, tuple(depths), tuple(heads))
    for stage, (dim, count) in enumerate(zip(result.dims, result.num_heads, strict=True)):
        if dim % count:
            raise ValueError(
                f'{model}: expected num_heads to divide the width of every stage; '
                f'got {count} heads for width {dim} in stage {stage}'
            )
    return result
