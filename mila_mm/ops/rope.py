"""Rotary position tables in 2-D, real-valued and in fp32 whatever the model's precision.

With K = C / 4 and theta_i = base**(-i / K), channel pair j < K turns by row * theta_j and pair j >= K by
column * theta_(j - K) (RoPE, arXiv 2104.09864, on two axes as in MILA, arXiv 2405.16605). At row 333 and theta 1 a
bf16 angle would be off by one radian, so tables never take the dtype of the activations. They are cached per size and
device, belong to no module and reach no state dict.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

_lines: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}
_superseded: list[tuple[Tensor, Tensor]] = []
"""Tables that larger ones have replaced. A captured CUDA graph may go on reading them; together they are smaller."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a table that will be cached from the CPU to a device, into memory that lasts.

    The first call under ``torch.compile(mode='reduce-overhead')`` allocates from the pool of a CUDA graph, which is
    reused as if the cache were not there. Pools are chosen for a thread, so another one copies.
    """
    if x.device == device:
        return x
    if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'mila_mm.ops: expected a run on a map of this size before the capture of a CUDA graph, got '
            'none: what is cached for it cannot be made inside of the graph'
        )
    if device.type == 'cuda' and device.index is None:  # the current device is one of a thread, too
        device = torch.device('cuda', torch.cuda.current_device())
    with ThreadPoolExecutor(1) as other:
        return other.submit(x.to, device).result()


def _angles(length: int, channels: int, base: float) -> Tensor:
    """Return position * theta_i, (length, channels // 4), fp32, on the CPU so that every device gets the same bits."""
    k = channels // 4
    theta = 1.0 / base ** (torch.arange(k, dtype=torch.float32, device='cpu') / k)
    return torch.arange(length, dtype=torch.float32, device='cpu')[:, None] * theta


def rope_tables(length: int, channels: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of one axis.

    The table of a (channels, base, device) only ever grows, to the next power of two, so that a new image size seldom
    builds one.

    Args:
        length: Positions needed; the larger of the grid's sides.
        channels: Width C of the tokens, a multiple of 4.
        base: Base of the geometric progression of frequencies.
        device: Where the tables live.

    Returns:
        ``(cos, sin)``, each of shape (L, C // 4) with L >= length, fp32, contiguous.
    """
    key = (channels, float(base), torch.device(device))
    tables = _lines.get(key)
    if tables is None or tables[0].shape[0] < length:
        # An inference tensor could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            angles = _angles(max(64, 1 << (length - 1).bit_length()), channels, base)
            tables = to_device(angles.cos(), key[2]), to_device(angles.sin(), key[2])
        if key in _lines:
            _superseded.append(_lines[key])
        _lines[key] = tables
    return tables


def build_rope_grid(
    height: int, width: int, channels: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Build the table of a whole grid, uncached; see :func:`rope_grid`."""
    k = channels // 4
    rows = _angles(height, channels, base)[:, None].expand(height, width, k)
    columns = _angles(width, channels, base)[None].expand(height, width, k)
    angles = torch.cat((rows, columns), dim=-1).reshape(height * width, 2 * k)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)  # four stages of some eight input sizes, both ways
def rope_grid(
    height: int,
    width: int,
    channels: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    inverse: bool = False,
) -> Tensor:
    """Cosine and sine of every channel pair of every token of a grid.

    Args:
        height: Rows H of the grid.
        width: Columns W of the grid.
        channels: Width C of the tokens, a multiple of 4.
        base: Base of the geometric progression of frequencies.
        device: Where the table lives.
        dtype: torch.float32, or torch.float64 for the same fp32 values cast up.
        inverse: Turn back instead: sines with the other sign.

    Returns:
        (H * W, C // 2, 2), [..., 0] the cosine and [..., 1] the sine; cached, not to be written to.
    """
    with torch.inference_mode(False), torch.no_grad():
        grid = build_rope_grid(height, width, channels, base, torch.device('cpu'), dtype)
        return to_device(grid * grid.new_tensor([1, -1]) if inverse else grid, device)


def grid_for(x: Tensor, height: int, width: int, channels: int, base: float, dtype: torch.dtype) -> Tensor:
    """:func:`rope_grid` on the device of x, built anew where a table from the cache must not meet x."""
    # A tensor subclass (a fake tensor in an export, say) must neither enter the cache nor meet what is in it, and a
    # trace that takes a table as a constant would serve one size only.
    plain = type(x) in (Tensor, torch.nn.Parameter) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    return (rope_grid if plain else build_rope_grid)(height, width, channels, base, x.device, dtype)


def clear_rope_cache() -> None:
    """Forget every cached table, as after a run on many sizes when memory matters.

    Not while a CUDA graph that has captured the attention will be replayed: it reads the tables where they were.
    """
    _lines.clear()
    _superseded.clear()
    rope_grid.cache_clear()
