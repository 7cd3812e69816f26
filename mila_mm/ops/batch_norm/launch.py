"""Launchers of the BatchNorm; :mod:`mila_mm.ops.batch_norm.kernels` states what they compute."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mila_mm.ops.batch_norm import kernels
from mila_mm.ops.rows import kernels as row_kernels
from mila_mm.ops.triton import configs, kept
from mila_mm.ops.triton.configs import Launch
from mila_mm.ops.triton.tensors import as_rows, fp32_like, on_device

Running = tuple[Tensor, Tensor, Tensor]
"""Mean and variance of batches so far, (C,), and their number."""

# Sixteen elements a thread and tensor: two loads of 128 bits of 16-bit numbers.
ROWS, NARROW_ROWS = Launch(64, 64, 8), Launch(128, 32, 8)
"""Rows of a step and channels of a program; the second for maps of at most 32 channels."""
MOMENTS = Launch(128, 16, 4)
_SUMMING_PROGRAMS, _WRITING_PROGRAMS = 512, 2048
"""Four of 256 threads fill a multiprocessor; more parts than those would only be more to join."""
MAX_ROWS = 2**28
"""Rows are counted in 32 bits, and the programs on the second axis of the grid are fewer than 2**16."""


def _setting(channels: int) -> Launch:
    return NARROW_ROWS if channels <= NARROW_ROWS.columns else ROWS


def rows_per_split(rows: int, channels: int, programs: int) -> int:
    """Rows that one of about ``programs`` programs takes: whole steps, the same on all GPUs."""
    setting = _setting(channels)
    splits = max(1, programs // -(-channels // setting.columns), rows // 8192)  # offsets below 2**31
    return -(-rows // (splits * setting.rows)) * setting.rows


class Plan:
    """The launches of a forward or a backward for one shape; once compiled, kernels are started by address.

    Args:
        rows, channels: Of x.
        strides: Of the rows of what the kernels read: x, or the gradient of y and x.
        relu: Whether one follows.

    Attributes:
        splits: Parts of the sums.
        launches: In their order, each with the places of its tensors among those of :meth:`run`.
    """

    def __init__(self, rows: int, channels: int, strides: tuple[int, ...], relu: bool) -> None:
        setting = _setting(channels)
        blocks = -(-channels // setting.columns)
        run, writing_run = (
            rows_per_split(rows, channels, programs) for programs in (_SUMMING_PROGRAMS, _WRITING_PROGRAMS)
        )
        self.splits = -(-rows // run)
        self._options = {'BLOCK': setting.rows, 'CHANNELS': setting.columns, **setting.options()}
        self._relu = {'RELU': relu, **self._options}
        self._summing, self._writing = (blocks, self.splits), (blocks, -(-rows // writing_run))
        self._numbers, self._written = (*strides, channels, rows, run), (*strides, channels, rows, writing_run)
        self.launches: list[tuple[kept.Launch, tuple[int, ...]]] = []

    def forward(self, momentum: float, eps: float, tracked: bool) -> Plan:
        """Add the kernels of :func:`batch_norm_forward`; tensors are those of its ``run``."""
        *_, channels, rows, run = self._numbers
        statistics = kept.Launch(kernels, 'batch_statistics_kernel', self._summing, self._numbers, **self._options)
        moments = kept.Launch(
            kernels, 'batch_moments_kernel', (-(-channels // MOMENTS.columns),),
            (channels, rows, run, self.splits, eps),
            BLOCK=MOMENTS.rows, CHANNELS=MOMENTS.columns, **MOMENTS.options(),
        )  # fmt: skip
        norm = kept.Launch(
            kernels, 'batch_norm_kernel', self._writing, (*self._written, momentum), TRACKED=tracked, **self._relu
        )
        self.launches = [(statistics, (0, 1)), (moments, (1, 2)), (norm, (0, 2, 3, 4, 5, 6, 7, 8))]
        return self

    def backward(self) -> Plan:
        """Add the kernels of :func:`batch_norm_backward`; tensors are those of its ``run``."""
        channels = self._numbers[2]
        sums = kept.Launch(kernels, 'batch_norm_sums_kernel', self._summing, self._numbers, **self._relu)
        setting = configs.COLUMN_REDUCE
        reduce = kept.Launch(
            row_kernels, 'column_reduce_kernel', (-(-2 * channels // setting.columns),),
            (2 * channels, channels, self.splits),
            BLOCK=setting.rows, CHANNELS=setting.columns, **setting.options(),
        )  # fmt: skip
        norm = kept.Launch(kernels, 'batch_norm_backward_kernel', self._writing, self._written, **self._relu)
        self.launches = [(sums, (0, 1, 2, 3, 4, 5)), (reduce, (5, 6, 7)), (norm, (0, 1, 2, 3, 4, 6, 7, 8))]
        return self

    def run(self, *tensors: Tensor) -> None:
        """Start all kernels on the current device, by address where they are bound and all memory is aligned."""
        if all(launch.bound for launch, _ in self.launches) and not kept.watched():
            addresses, bits = [x.data_ptr() for x in tensors], 0
            for address in addresses:
                bits |= address
            if not bits % 16:
                stream = kept.current_stream()
                for launch, places in self.launches:
                    launch.at(stream, *[addresses[place] for place in places])
                return
        for launch, places in self.launches:
            launch(*[tensors[place] for place in places])


@lru_cache(maxsize=256)
def _forward_plan(
    device: torch.device, dtypes: tuple[torch.dtype, ...], rows: int, channels: int, stride: int, relu: bool,
    tracked: bool, momentum: float, eps: float,
) -> Plan:  # fmt: skip
    """``device`` and ``dtypes`` are what kernels are bound to."""
    return Plan(rows, channels, (stride,), relu).forward(momentum, eps, tracked)


@lru_cache(maxsize=256)
def _backward_plan(
    device: torch.device, dtypes: tuple[torch.dtype, ...], rows: int, channels: int, strides: tuple[int, int],
    relu: bool,
) -> Plan:  # fmt: skip
    return Plan(rows, channels, strides, relu).backward()


def forget_plans() -> None:
    """Make plans anew, as for other settings."""
    _forward_plan.cache_clear()
    _backward_plan.cache_clear()


def batch_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, running: Running | None, momentum: float, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernels of :func:`mila_mm.ops.batch_norm`.

    Args:
        x: (B, N, C), any strides, at least two tokens. weight, bias: (C,) of any float dtype.
        running: Moved in place by the last kernel, so that nothing has changed where another one fails; or None.
        momentum: Share of the batch in the running statistics. eps: Added to the variance. relu: Whether one follows.

    Returns:
        y (B, N, C) in x's dtype, contiguous; statistics (3, C) in fp32: mean, rstd, variance.
    """
    data, weight, bias = as_rows(x), weight.contiguous(), bias.contiguous()
    rows, channels = data.shape
    tracked = running is not None
    dtypes = x.dtype, weight.dtype, bias.dtype, *((running[0].dtype, running[1].dtype) if running is not None else ())
    plan = _forward_plan(
        x.device, dtypes, rows, channels, data.stride(0), relu, tracked, float(momentum), float(eps)
    )  # fmt: skip
    # The parts lie behind the statistics, which outlive them: one allocation less, and a few hundred KiB at most.
    buffer = fp32_like(x, 3 + 2 * plan.splits, channels)
    statistics, parts = buffer.split_with_sizes((3, 2 * plan.splits))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        plan.run(data, parts, statistics, weight, bias, y, *(running or (statistics,) * 3))
    return y, statistics


def batch_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients.

    Args:
        grad_y: Gradient of y, (B, N, C), any strides. x, weight, bias, relu: As in the forward pass.
        statistics: What it returned.

    Returns:
        Gradients of x (B, N, C), weight and bias, contiguous, in their dtypes.
    """
    grad, data, weight, bias = as_rows(grad_y), as_rows(x), weight.contiguous(), bias.contiguous()
    rows, channels = data.shape
    dtypes = grad.dtype, x.dtype, weight.dtype, bias.dtype
    plan = _backward_plan(x.device, dtypes, rows, channels, (grad.stride(0), data.stride(0)), relu)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = fp32_like(x, plan.splits, 2 * channels)
    grad_weight, grad_bias = fp32_like(x, 2, channels).unbind(0)
    with on_device(x):
        plan.run(grad, data, statistics, weight, bias, parts, grad_weight, grad_bias, grad_x)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
