"""How the gradients of a block's six matrices come about: by kernels for several of them at once, or by products."""

from __future__ import annotations

import torch

from mila_mm.ops.block import kernels
from mila_mm.ops.block.gradients import gradient_sizes
from mila_mm.ops.block.layout import Shape
from mila_mm.ops.rows import kernels as row_kernels
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import Launch


class Matrices:
    """The launches for one shape.

    In 16 bits two kernels write what is wanted, in the parameters' dtype, or of many rows parts, which a third one
    sums. Where the products are large, and in fp32, each is PyTorch's, and one call casts them all if need be.

    Args:
        shape: Of the block.

    Attributes:
        mix: Takes the gradients of joint, qk and out_proj, what these are of, and ``out``; None for products.
        mlp: Takes those of fc1 and fc2, the latter twice, what these are of, and ``out``; None for products.
        sums: Takes the parts and the result, twice; None where there are no parts.
        casts: Whether what products write has to be cast.
        place: Dtype and numbers of the memory that is needed beside the result.
    """

    def __init__(self, shape: Shape) -> None:
        sizes = gradient_sizes(shape.channels, shape.hidden)
        total, rows, c, hidden = sum(sizes[-6:]), shape.batch * shape.tokens, shape.channels, shape.hidden
        self.mix: Launch | None = None
        self.mlp: Launch | None = None
        self.sums: Launch | None = None
        by_kernels = shape.dtype != torch.float32 and 2 * total * rows <= configs.WEIGHT_GRADIENTS_FLOP
        self.casts = not by_kernels and shape.master != shape.dtype
        self.place = shape.dtype, total if self.casts else 0
        if not by_kernels:
            return
        run = configs.weight_rows_per_split(rows, c)
        splits = -(-rows // run)
        first, distance = (sum(sizes[:-6]), 0) if splits == 1 else (0, total)
        self.mix = _launch(shape, ((2 * c, c), (2 * c, c), (c, c)), first, distance, run)
        self.mlp = _launch(shape, ((hidden, c), (c, hidden), (0, hidden)), first + 5 * c * c, distance, run)
        if splits > 1:
            self.place = torch.float32, splits * total
            setting = configs.COLUMN_REDUCE
            self.sums = Launch(
                row_kernels, 'column_reduce_kernel', (-(-total // setting.columns),), (total, total, splits),
                BLOCK=setting.rows, CHANNELS=setting.columns, **setting.options(),
            )  # fmt: skip

    @property
    def launches(self) -> list[Launch]:
        """Those that there are."""
        return [launch for launch in (self.mix, self.mlp, self.sums) if launch is not None]


def _launch(shape: Shape, results: tuple[tuple[int, int], ...], first: int, distance: int, run: int) -> Launch:
    """The kernel for results of these heights and widths; see there for the rest."""
    rows, setting = shape.batch * shape.tokens, configs.weight_gradients_launch(shape.channels)
    side = setting.columns
    tiles = sum(-(-height // side) * -(-width // side) for height, width in results)
    return Launch(
        kernels, 'weight_gradients_kernel', (tiles, -(-rows // run)),
        (*(number for sides in results for number in sides), first, distance, rows, run),
        ROWS=setting.rows, BLOCK=side, STAGES=setting.stages, LOW=not configs.interpreted(), **setting.options(),
    )  # fmt: skip
