"""A backbone to look into, from a config of mmdet, mmseg or mmpretrain, or from timm, with the images it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import load_config, one_line, scope_of
from mila_mm.engine.runner.find_checkpoint import check_checkpoint_file
from mila_mm.engine.runner.fit import load_checkpoint_into
from mila_mm.errors import UserError
from mila_mm.weights.load import load_backbone, read_checkpoint
from mila_mm.weights.names import backbone_prefix

_TIMM = 'timm:'
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


@dataclass(frozen=True)
class FeatureModel:
    """A backbone in eval mode.

    Attributes:
        label: What figures call it.
        backbone: The module, for hooks.
        features: Images (B, 3, H, W), normalised, to one map (B, C_i, H_i, W_i) for each stage.
        mean: Of the channels, 0 to 255, (3,).
        std: Of the channels, 0 to 255, (3,).
        takes_bgr: Whether channels come as BGR.
    """

    label: str
    backbone: nn.Module
    features: Callable[[Tensor], Sequence[Tensor]]
    mean: Tensor
    std: Tensor
    takes_bgr: bool = False

    def normalise(self, images: np.ndarray) -> Tensor:
        """Turn RGB images (B, H, W, 3) uint8 into what ``features`` takes."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        x = x.flip(1) if self.takes_bgr else x
        return (x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)


def open_feature_model(spec: str) -> FeatureModel:
    """Build the backbone that a command line names.

    Args:
        spec: ``[LABEL=]SOURCE[@WEIGHTS]``. SOURCE is a config (path, ``mmdet::...``, ``mmseg::...``) or ``timm:NAME``;
            WEIGHTS a checkpoint of that whole model, or of a MILA backbone, a ``mila://`` name, or with timm
            ``pretrained``. Without weights they are random.

    Raises:
        UserError: If there is no such model or the weights do not fit.
    """
    label, sign, source = spec.partition('=')
    if not sign:
        label, source = '', spec
    source, _, weights = source.partition('@')
    if source.startswith(_TIMM):
        return _from_timm(label or source.removeprefix(_TIMM), source.removeprefix(_TIMM), weights)
    return _from_config(label or Path(source).stem, source, weights)


def _from_timm(label: str, name: str, weights: str) -> FeatureModel:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f'*{name.partition("_")[0]}*')[:3]
        raise UserError(f'timm:{name}: timm knows no such model; near: {", ".join(close) or "none"}')
    options: dict[str, Any] = {}
    if weights and weights != 'pretrained':
        check_checkpoint_file(weights, f'timm:{name}')
        options = {'pretrained_cfg_overlay': dict(file=weights)}
    try:
        model = timm.create_model(name, features_only=True, pretrained=bool(weights), **options)
    except (RuntimeError, AttributeError) as error:  # timm's way to say that a model has no maps, or weights do not fit
        raise UserError(f'timm:{name}: {one_line(error)}') from error
    cfg = model.pretrained_cfg
    mean, std = (255 * torch.tensor(cfg[key], dtype=torch.float32) for key in ('mean', 'std'))
    return FeatureModel(label, getattr(model, 'model', model).eval(), model.eval(), mean, std)


def _from_config(label: str, source: str, weights: str) -> FeatureModel:
    cfg = load_config(source)
    init_default_scope(scope_of(cfg))
    with building('model'):
        model = MODELS.build(_without_pretrained(cfg.model)).eval()
    backbone = getattr(model, 'backbone', model)
    if weights:
        check_checkpoint_file(weights, label)
        checkpoint = read_checkpoint(weights)
        if backbone is not model and backbone_prefix(checkpoint['state_dict']) == '':
            load_backbone(backbone, checkpoint, label=weights)
        else:
            load_checkpoint_into(model, checkpoint, weights, strict=True)
    if backbone is model and not hasattr(model, 'forward_intermediates'):
        raise UserError(f'{source}: the model {type(model).__name__} has no backbone to look into')
    features = backbone if backbone is not model else lambda x: model.forward_intermediates(x, intermediates_only=True)
    data = getattr(model, 'data_preprocessor', None)
    mean, std = (getattr(data, key, None) for key in ('mean', 'std'))
    # mmdet, mmseg and mmpretrain each have a name of their own for the same switch.
    converts = any(getattr(data, key, False) for key in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
    return FeatureModel(
        label,
        backbone,
        features,
        torch.zeros(3) if mean is None else mean.flatten(),
        torch.ones(3) if std is None else std.flatten(),
        takes_bgr=not converts,
    )


def _without_pretrained(cfg: Any) -> Any:
    """Take out weights that a config would fetch: they are named on the command line or random."""
    if isinstance(cfg, dict):
        cfg.pop('pretrained', None)
        if isinstance(cfg.get('init_cfg'), dict) and cfg['init_cfg'].get('type') == 'Pretrained':
            cfg['init_cfg'] = None
        # One process, random weights: SyncBN has no CPU kernel and is BN here.
        if cfg.get('type') == 'SyncBN':
            cfg['type'] = 'BN'
        for value in cfg.values():
            _without_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            _without_pretrained(value)
    return cfg


def read_images(paths: Iterable[str | Path], size: tuple[int, int], limit: int | None = None) -> np.ndarray:
    """Read images at one size: the short side is scaled to fit, and the middle cut out.

    Args:
        paths: Files, or folders, of which all images are taken in the order of their names.
        size: Height and width.
        limit: How many to take at most. Defaults to all.

    Returns:
        (N, H, W, 3) uint8 RGB.

    Raises:
        UserError: If there is no image or one cannot be read.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES) if path.is_dir() else [path])
    ][:limit]
    if not files:
        raise UserError(f'--images: no image in {", ".join(map(str, paths)) or "nothing"}')
    return np.stack([_read(file, *size) for file in files])


def _read(file: Path, height: int, width: int) -> np.ndarray:
    if not file.is_file():
        raise UserError(f'--images: {file} does not exist (looked in {Path.cwd()})')
    # imread prints a line of its own where it cannot read
    image = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR) if file.stat().st_size else None
    if image is None:
        raise UserError(f'--images: {file} is no image that can be read')
    scale = max(height / image.shape[0], width / image.shape[1])
    if scale != 1:
        shape = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return cv2.cvtColor(image[top : top + height, left : left + width], cv2.COLOR_BGR2RGB)
