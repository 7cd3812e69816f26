"""A trained model that takes images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.config.prepare import configure_weights
from mila_mm.engine.inference.classes import config_meta, saved_meta
from mila_mm.engine.inference.drawing import SupervisionDrawing, VisualizerDrawing, has_supervision
from mila_mm.engine.inference.sources import read_picture
from mila_mm.engine.runner.find_checkpoint import check_checkpoint_file
from mila_mm.engine.runner.fit import load_checkpoint_into
from mila_mm.errors import UserError
from mila_mm.weights import PUBLISHED, read_checkpoint

_LOADS_IMAGE = 'LoadImageFromFile'
_LOADS_LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations', 'LoadProposals')


class Predictor:
    """A detector, an instance, panoptic or semantic segmentor, ready to predict.

    >>> predictor = Predictor('mask_rcnn_mila_t_3x', 'mila://mask-rcnn-tiny-3x')
    >>> sample = predictor(['street.jpg'])[0]
    >>> picture = predictor.draw('street.jpg', sample)

    Args:
        config: As for :func:`mila_mm.engine.load_config`, or a config.
        checkpoint: A file, an address, or the name of published weights. It must fit the model key by key, unless the
            config says ``load_strict=False``.
        device: ``'cuda'``, ``'cuda:1'``, ``'cpu'``, ... Defaults to the GPU where there is one.
        cfg_options: Overrides as ``key.of.entry=value``.

    Attributes:
        model: The model, in evaluation mode.
        scope: ``'mmdet'`` or ``'mmseg'``.
        classes: Names of the classes, by index.
        palette: RGB colour of each class; None to let the library choose.

    Raises:
        UserError: If the config, the checkpoint or the device cannot be used, or the checkpoint is another model's.
    """

    def __init__(
        self, config: str | Config, checkpoint: str, *, device: str | None = None, cfg_options: Sequence[str] = ()
    ) -> None:
        cfg = deepcopy(config) if isinstance(config, Config) else load_config(config, cfg_options)
        self.scope = scope_of(cfg)
        if self.scope == 'mmpretrain':
            raise UserError(f'{config} is a classifier; predict is for detectors and segmentors')
        checkpoint = f'mila://{checkpoint}' if checkpoint in PUBLISHED and not Path(checkpoint).exists() else checkpoint
        check_checkpoint_file(checkpoint, 'CHECKPOINT')
        self.device = _usable(device or get_device())
        init_default_scope(cfg.get('default_scope') or self.scope)
        configure_weights(cfg)
        pipeline = _test_pipeline(cfg)
        if cfg.get('data_preprocessor'):
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        with building('model'):
            self.model = MODELS.build(cfg.model)
        content = read_checkpoint(checkpoint)
        load_checkpoint_into(self.model, content, f'checkpoint {checkpoint}', cfg.get('load_strict', True))
        meta = _dataset_meta(cfg, self.scope, content)
        self.classes: tuple[str, ...] = tuple(meta['classes'])
        self.palette = meta.get('palette')
        self.model.dataset_meta = meta
        self.model.cfg = cfg
        self.model = revert_sync_batchnorm(self.model).to(self.device).eval()
        self._to_float32 = bool(pipeline[0].get('to_float32', False))
        self._pipeline: Callable[[dict[str, Any]], dict[str, Any]] = Compose(pipeline[1:])
        self._drawing = VisualizerDrawing(cfg.get('visualizer'), self.scope, meta)
        self._instances_drawing = SupervisionDrawing(self.classes, self.palette) if has_supervision() else self._drawing

    def __call__(self, images: Sequence[str | Path | np.ndarray]) -> list[BaseDataElement]:
        """Predict on images as one batch.

        Args:
            images: Files, or arrays (H, W, 3) uint8 in BGR. Sizes may differ.

        Returns:
            A sample of mmdet or mmseg for each, on the CPU: ``pred_instances`` with ``bboxes`` (N, 4) as x1, y1, x2,
            y2 in pixels of the image, ``labels`` (N,), ``scores`` (N,), in a model with masks ``masks`` (N, H, W);
            ``pred_panoptic_seg.sem_seg`` (1, H, W); ``pred_sem_seg.data`` (1, H, W) of class indices.

        Raises:
            UserError: If a file cannot be read.
        """
        inputs = [self._prepared(image, index) for index, image in enumerate(images)]
        # mmseg stacks without padding
        groups = [list(range(len(inputs)))] if self.scope == 'mmdet' else _of_equal_shape(inputs)
        samples: dict[int, BaseDataElement] = {}
        for group in groups:
            with torch.no_grad():
                outputs = self.model.test_step(pseudo_collate([inputs[index] for index in group]))
            for index, sample in zip(group, outputs, strict=True):
                for name in ('seg_logits', 'gt_instances', 'ignored_instances', 'gt_sem_seg'):
                    if name in sample:
                        delattr(sample, name)
                samples[index] = sample.cpu()
        return [samples[index] for index in range(len(inputs))]

    def draw(self, image: str | Path | np.ndarray, sample: BaseDataElement, score_thr: float = 0.3) -> np.ndarray:
        """Draw predictions on an image: boxes and masks with supervision where it is installed, else with mmdet.

        Args:
            image: File, or array (H, W, 3) uint8 in BGR.
            sample: What was predicted on it.
            score_thr: Boxes and masks of lower scores are left out. Defaults to 0.3.

        Returns:
            The picture, an array like ``image``.
        """
        array = image if isinstance(image, np.ndarray) else read_picture(image)
        panoptic = 'pred_panoptic_seg' in sample
        drawing = self._instances_drawing if 'pred_instances' in sample and not panoptic else self._drawing
        return drawing(array, sample, score_thr)

    def _prepared(self, image: str | Path | np.ndarray, index: int) -> dict[str, Any]:
        array = image if isinstance(image, np.ndarray) else read_picture(image)
        height, width = array.shape[:2]
        return self._pipeline(
            {
                'img': array.astype(np.float32) if self._to_float32 else array,
                'img_path': str(image) if not isinstance(image, np.ndarray) else None,
                'img_id': index,
                'img_shape': (height, width),
                'ori_shape': (height, width),
            }
        )


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        raise UserError(f'--device {name} cannot be used; there are {gpus} CUDA devices, and cpu') from error
    return device


def _test_pipeline(cfg: Config) -> list[dict[str, Any]]:
    """Return the transforms of testing, the loading of the image first, without the loading of labels."""
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict) and not dataset.get('pipeline'):
        dataset = dataset['dataset']
    pipeline = dataset.get('pipeline') or cfg.get('test_pipeline')
    if not pipeline:
        raise UserError('the config has no test_dataloader whose pipeline says how images are prepared')
    kinds = [str(step['type']).rpartition('.')[2] for step in pipeline]
    if kinds[0] != _LOADS_IMAGE:
        raise UserError(f'predict reads pictures itself, in place of {_LOADS_IMAGE}; the config reads with {kinds[0]}')
    return [dict(step) for step, kind in zip(pipeline, kinds, strict=True) if kind not in _LOADS_LABELS]


def _dataset_meta(cfg: Config, scope: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the names and colours of the classes: the checkpoint's, else the config's, else the data set's."""
    meta, known = saved_meta(checkpoint), config_meta(cfg, scope)
    for key in ('classes', 'palette'):
        if meta.get(key) is None and known.get(key) is not None:
            meta[key] = known[key]
    if not meta.get('classes'):
        raise UserError(
            'neither the checkpoint nor the config names the classes; '
            'add them: --cfg-options test_dataloader.dataset.metainfo.classes="(a,b)"'
        )
    if meta.get('palette') is not None and len(meta['palette']) < len(meta['classes']):
        del meta['palette']
    return meta


def _of_equal_shape(inputs: Sequence[dict[str, Any]]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, each in enumerate(inputs):
        groups.setdefault(tuple(each['inputs'].shape), []).append(index)
    return list(groups.values())
