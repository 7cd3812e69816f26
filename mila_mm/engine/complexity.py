"""Count the multiply-adds and parameters of a whole detector or segmentor, without data or weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import scope_of
from mila_mm.errors import UserError

# (height, width) at which papers quote detectors, UperNet on ADE20K, and classifiers.
DEFAULT_SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048), 'mmpretrain': (224, 224)}
_MAX_SIDE = 16384


@dataclass(frozen=True)
class Complexity:
    """What one image costs.

    Attributes:
        macs: Multiply-adds of one forward pass; what papers print as "FLOPs".
        params: Number of parameters, training-only heads included.
        parts: Part of the model to its (multiply-adds, parameters).
        input_shape: Height and width that were asked for.
        padded_shape: Height and width that the model sees.
        training_only: Parts that take no part in inference.
    """

    macs: int
    params: int
    parts: dict[str, tuple[int, int]]
    input_shape: tuple[int, int]
    padded_shape: tuple[int, int]
    training_only: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add."""
        return 2 * self.macs


class _TensorForward(nn.Module):
    """The forward pass up to the heads' raw outputs, of an image tensor alone."""

    def __init__(self, model: nn.Module, data_samples: list[Any]) -> None:
        super().__init__()
        self.model = model
        self.data_samples = data_samples

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images, self.data_samples, mode='tensor')


def operation_counter(model: nn.Module, image: torch.Tensor) -> FlopAnalyzer:
    """Make mmengine's counter of multiply-adds for a model and its input, with our own ops.

    A scan with a forget gate counts as 9 operations for each token, channel and state, as selective scans are counted
    in the repositories of VMamba and of others since; the multiply-adds of the recurrence proper are fewer.

    Args:
        model: In eval mode.
        image: Its only input.

    Returns:
        The counter: ``total()`` and ``by_module()`` run it.
    """
    counter = FlopAnalyzer(model, (image,)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.set_op_handle('mila_mm::gated_scan_forward', _count_scan)


def _count_scan(inputs: list[Any], outputs: list[Any]) -> int:
    tokens = inputs[2].type().sizes()  # v: B, N, C
    return 9 * math.prod(tokens) * inputs[4].type().sizes()[0]


def count_complexity(cfg: Config, shape: tuple[int, int] | None = None, device: str = 'cpu') -> Complexity:
    """Count by tracing one forward pass on a random image.

    mmengine's counter sees convolutions, linear layers, (batched) matrix products, einsum, norms and resizing.
    MILA runs with its reference attention, whose products it can see. A two-stage detector is
    counted with as many proposals as its ``test_cfg`` allows, whatever random weights would propose:
    nothing is suppressed.

    Args:
        cfg: Config with a model; changed.
        shape: Height and width in pixels. Defaults to 800 x 1280 for detectors, 512 x 2048 for segmentors, 224 x 224
            for classifiers.
        device: Where to run. Defaults to 'cpu'.

    Returns:
        The counts.

    Raises:
        UserError: If the shape or a value in the config is refused.
    """
    scope = scope_of(cfg)
    height, width = shape or DEFAULT_SHAPES[scope]
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise UserError(f'--shape: expected sides from 1 to {_MAX_SIDE}, got {height} x {width}')
    init_default_scope(scope)
    for part in _dicts_in(cfg.model):
        _make_countable(part)
    with building('model'):
        model = MODELS.build(cfg.model)
    model = revert_sync_batchnorm(model).to(device).eval()
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1) or 1
    padded = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
    traced = _TensorForward(model, [_sample(scope, (height, width), padded)])
    image = torch.randn(1, 3, *padded, device=device, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        counter = operation_counter(traced, image)
        macs = int(counter.total())
        by_module = counter.by_module()
    sizes = parameter_count(model)
    parts = {name: (int(by_module[f'model.{name}']), sizes[name]) for name, _ in model.named_children() if sizes[name]}
    return Complexity(
        macs=macs,
        params=sizes[''],
        parts=parts,
        input_shape=(height, width),
        padded_shape=padded,
        training_only=tuple(name for name, (part_macs, _) in parts.items() if not part_macs),
    )


def _make_countable(part: dict[str, Any]) -> None:
    """Change one dict inside a model's config so that the model can be traced without files."""
    part.pop('pretrained', None)
    if isinstance(part.get('init_cfg'), dict) and part['init_cfg'].get('type') == 'Pretrained':
        part['init_cfg'] = None
    if str(part.get('type')).rpartition('.')[2] in ('MILA', 'MILAImageClassifier'):
        part['attn_backend'] = 'reference'
    rpn = (part.get('test_cfg') or {}).get('rpn') if isinstance(part.get('test_cfg'), dict) else None
    if rpn and isinstance(rpn.get('nms'), dict):
        rpn['nms']['iou_threshold'] = 1.0


def _dicts_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for child in list(children):
        yield from _dicts_in(child)


def _sample(scope: str, shape: tuple[int, int], padded: tuple[int, int]) -> Any:
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    elif scope == 'mmpretrain':
        from mmpretrain.structures import DataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    return Sample(
        metainfo=dict(
            img_shape=shape, ori_shape=shape, pad_shape=padded, batch_input_shape=padded, scale_factor=(1.0, 1.0)
        )
    )
