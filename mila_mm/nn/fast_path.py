"""Which blocks of a pass run as one node each, on weights cast at once, and why others do not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from mila_mm.nn import block_node
from mila_mm.nn.inspection import Watch, layers_of, parameters_of
from mila_mm.nn.layers import Block, Downsample, LinearAttention, Stage, Stem
from mila_mm.nn.nodes import NormNode
from mila_mm.nn.plain import why_not_plain
from mila_mm.nn.step_weights import Castable, CastConvolutions, Parameters, Taps
from mila_mm.ops import why_not_triton_stencil
from mila_mm.ops.common import as_written, autocast_dtype, transformed
from mila_mm.ops.rope import to_device

_logger = logging.getLogger('mila_mm')
_LOW = (torch.bfloat16, torch.float16)


class Walked(Protocol):
    """What the passes of a trunk are prepared from."""

    fused: Any
    layers: nn.ModuleList
    patch_embed: nn.Module


def stages_of(trunk: Walked) -> Iterable[Stage]:
    """The stages of a trunk; each may stand in a wrapper, which hands its attributes on."""
    return cast('Iterable[Stage]', trunk.layers)


class Prepared(NamedTuple):
    """What a block takes in a pass: parameters in the order of its node, and the rest as in `block_node.Call`."""

    params: tuple[Tensor, ...]
    products: block_node.Products
    scales: tuple[Tensor | None, Tensor | None]
    taps: Tensor | None


class Chosen(NamedTuple):
    """What runs on weights cast at once.

    Attributes:
        blocks: Those that are a node each, with their parameters in its order.
        convolutions: For stem and downsamplings, by their id, weights and biases of their convolutions in their order.
        castable: All of these weights.
        taps: Those of the blocks' attentions.
    """

    blocks: list[tuple[nn.Module, tuple[Tensor, ...]]]
    convolutions: dict[int, list[Parameters]]
    castable: Castable
    taps: Taps

    @classmethod
    def of(
        cls,
        blocks: list[tuple[nn.Module, tuple[Tensor, ...]]],
        convolutions: dict[int, list[Parameters]],
    ) -> Chosen:
        """Gather the weights."""
        parts = [part for _, params in blocks for part in _products_of(params)]
        others = [p for pairs in convolutions.values() for pair in pairs for p in pair if p is not None]
        return cls(blocks, convolutions, Castable([*parts, *((p,) for p in others)]), Taps(blocks))


class Pass:
    """What a pass of a trunk runs on: the blocks that are a node each, with their weights, and cast convolutions.

    Args:
        dtype: That products and convolutions are computed in.
        blocks: For each block that is a node, by its id, what it takes.
        convolutions: For stem and downsamplings, by their id, their convolutions.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        blocks: dict[int, Prepared],
        convolutions: dict[int, CastConvolutions],
    ) -> None:
        self._dtype = dtype
        self._blocks = blocks
        self._convolutions = convolutions

    def convolutions_of(self, module: nn.Module | None) -> CastConvolutions | None:
        """What a stem or a downsampling takes in place of its convolutions' parameters."""
        return self._convolutions.get(id(module))

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """LayerNorm of tokens (B, N, C) in the dtype of the pass: what comes next would cast autocast's fp32 to it."""
        if not _norms_in_fp32(x) or why_not_plain('', norm, nn.LayerNorm) is not None:
            return norm(x)
        assert isinstance(norm, nn.LayerNorm)
        if type(norm.weight) is not nn.Parameter or type(norm.bias) is not nn.Parameter:
            return norm(x)
        return NormNode.apply(x, norm.weight, norm.bias, norm.eps, self._dtype)

    def run(self, blocks: Iterable[nn.Module], x: Tensor, height: int, width: int) -> Tensor:
        """Send tokens (B, N, C) through blocks."""
        blocks = list(blocks)
        if all(id(block) in self._blocks for block in blocks):
            with as_written(x):  # entered once: it costs as much as a launch
                for block in blocks:
                    x = self._node(block, x, height, width)
            return x
        for block in blocks:
            if id(block) not in self._blocks:
                x = block(x, height, width)
                continue
            with as_written(x):
                x = self._node(block, x, height, width)
        return x

    def _node(self, block: nn.Module, x: Tensor, height: int, width: int) -> Tensor:
        assert isinstance(block, Block) and isinstance(block.attn, LinearAttention)
        params, products, scales, taps = self._blocks[id(block)]
        setting = block_node.Setting(height, width, block.attn.num_heads, block.norm1.eps, block.norm2.eps, self._dtype)
        return block_node.run(x, block_node.Call(products, scales, setting, taps), params)


class FastPath:
    """Prepares the passes of a trunk. It keeps what does not change from pass to pass; a copy begins empty."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._chosen: Chosen | None = None
        self._watches: list[Watch] = []
        self._said: set[str] = set()

    def __deepcopy__(self, memo: Any) -> FastPath:
        return FastPath()

    def __reduce__(self) -> tuple[type[FastPath], tuple[()]]:
        return FastPath, ()

    def prepare(self, trunk: Walked, image: Tensor) -> Pass | None:
        """Cast the weights of a pass of ``trunk`` over an image; None where all runs module by module."""
        if not _may_be_a_node(image):
            return None
        low = autocast_dtype(image.device.type)
        dtype = image.dtype if low is None else low
        if trunk.fused == 'auto' and not _wins(trunk, image, dtype):
            return None
        chosen = self._choose(trunk, image, dtype, low is not None)
        if not chosen.blocks:
            return None
        values = chosen.castable.cast(dtype)
        width = len(block_node.Products._fields)
        products = [
            block_node.Products._make(values[i : i + width]) for i in range(0, width * len(chosen.blocks), width)
        ]
        scales = _scales([block for block, _ in chosen.blocks], image, dtype)
        taps = chosen.taps.lay_out() if _kernels_run(trunk, image) else [None] * len(chosen.blocks)
        blocks = {
            id(block): Prepared(params, *rest)
            for (block, params), rest in zip(chosen.blocks, zip(products, scales, taps, strict=True), strict=True)
        }
        others = iter(values[width * len(chosen.blocks) :])
        return Pass(dtype, blocks, {key: _values(params, others) for key, params in chosen.convolutions.items()})

    def _choose(self, trunk: Walked, image: Tensor, dtype: torch.dtype, casts: bool) -> Chosen:
        """What runs as a node, as in the pass before where nothing has changed since; convolutions if ``casts``."""
        parts = [trunk.patch_embed, *(stage.downsample for stage in stages_of(trunk))]
        modules = [*(block for stage in stages_of(trunk) for block in stage.blocks), *parts]
        backends = (getattr(getattr(module, 'attn', None), 'backend', None) for module in modules[: -len(parts)])
        key = dtype, casts, image.device, *map(id, modules), *backends
        known = self._chosen  # another thread may have made another one in between
        if key == self._key and known is not None and all(watch.holds() for watch in self._watches):
            return known
        blocks: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
        for block in modules[: -len(parts)]:
            assert block is not None
            params = parameters_of(block)
            if isinstance(params, str):
                self._say(params)
            elif params[0].dtype not in (dtype, torch.float32) or (not casts and params[0].dtype != dtype):
                self._say(f'parameters of {params[0].dtype} in a pass in {dtype}')
            elif params[0].device == image.device:
                blocks.append((block, params))
        chosen = Chosen.of(blocks, _convolutions_of(trunk) if casts and blocks else {})
        self._key = ()
        self._chosen, self._watches = chosen, [Watch(module) for module in modules if module is not None]
        self._key = key
        return chosen

    def _say(self, reason: str) -> None:
        """Log a reason, once for each model."""
        if reason not in self._said:
            self._said.add(reason)
            _logger.warning('MILA: blocks run module by module, which takes the host longer: %s', reason)


def _may_be_a_node(image: Tensor) -> bool:
    """False in what traces, transforms or compiles, where a block has to be plain operators and registered ops."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(image) is not Tensor or transformed():
        return False
    hooked = module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks
    return image.device.type in ('cpu', 'cuda') and forward_ad._current_level < 0 and not hooked


def _wins(trunk: Walked, image: Tensor, dtype: torch.dtype) -> bool:
    """Where nodes are taken unasked: with the kernels on a GPU, and in 16 bits on a CPU."""
    return _kernels_run(trunk, image) if image.is_cuda else dtype in _LOW


def _kernels_run(trunk: Walked, image: Tensor) -> bool:
    """Whether Triton kernels serve the model where the image is."""
    if not image.is_cuda:
        return False
    first: Any = next(iter(stages_of(trunk))).blocks[0]
    return why_not_triton_stencil(first.norm1.weight[None, None]) is None


def _norms_in_fp32(x: Tensor) -> bool:
    """Whether PyTorch's LayerNorm would return fp32 in place of 16 bits: a GPU's autocast has it so, a CPU's not."""
    return x.is_cuda and autocast_dtype(x.device.type) in _LOW


def _products_of(params: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The parameters behind each of a block's :class:`~mila_mm.nn.block_node.Products`."""
    return [params[4:6], params[6:8], *((p,) for p in (*params[10:12], *params[14:16], *params[20:24]))]


def _convolutions_of(trunk: Walked) -> dict[int, list[Parameters]]:
    """Weights and biases of the convolutions of stem and downsamplings, of those that nobody has changed."""
    found = {}
    parts: list[tuple[nn.Module | None, type[nn.Module]]] = [(trunk.patch_embed, Stem)]
    parts += [(stage.downsample, Downsample) for stage in stages_of(trunk)]
    for module, kind in parts:
        layers = layers_of(module, kind)
        if layers is not None:
            found[id(module)] = [(layer.conv.weight, layer.conv.bias) for layer in layers]
    return found


def _values(pairs: list[Parameters], values: Iterator[Tensor]) -> CastConvolutions:
    """The next of ``values`` for the parameters of a module's convolutions."""
    return CastConvolutions([(next(values), None if bias is None else next(values)) for _, bias in pairs], pairs)


def _scales(blocks: list[nn.Module], image: Tensor, dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    """What stochastic depth multiplies the branches of each block by, (B,), drawn at once for all of them."""
    drops = [block._modules['drop_path'] for block in blocks]
    rates = [getattr(drop, 'drop_prob', 0.0) if drop is not None and drop.training else 0.0 for drop in drops]
    dropping = [i for i, rate in enumerate(rates) if rate > 0]
    result: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(blocks)
    if not dropping:
        return result
    keep = _kept_share(tuple(rates[i] for i in dropping), image.device).expand(-1, image.shape[0])
    scales = torch.bernoulli(keep)
    first = drops[dropping[0]]
    assert isinstance(first, DropPath)
    if first.scale_by_keep:
        scales.div_(keep)
    # Rows at multiples of 16 numbers: kernels are started by address where addresses are multiples of 16 bytes.
    size = image.shape[0]
    rows = scales.new_empty((len(scales), size + -size % 16), dtype=dtype)[:, :size]
    branches = rows.copy_(scales).unbind(0)
    for place, i in enumerate(dropping):
        result[i] = branches[2 * place], branches[2 * place + 1]
    return result


@lru_cache(maxsize=64)
def _kept_share(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """(2 * len(rates), 1): the chance of each branch to stay."""
    with torch.inference_mode(False):
        shares = torch.tensor([1 - rate for rate in rates for _ in range(2)], dtype=torch.float32, device='cpu')
        return to_device(shares.view(-1, 1), device)
