"""Test a detector or segmentor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.hooks import Hook
from mmengine.registry import METRICS

from mila_mm.engine.config.build_errors import plain_failures
from mila_mm.engine.config.checks import check_data, check_work_dir
from mila_mm.engine.config.load import load_config, refuse_old, scope_of
from mila_mm.engine.config.prepare import fetch_weights, prepare, prepare_launch, set_work_dir
from mila_mm.engine.data.first_step import naming_parts
from mila_mm.engine.data.metrics import COCO_METRICS, metrics_of
from mila_mm.engine.data.splits import kind_name
from mila_mm.engine.hooks.check_data import checked_start
from mila_mm.engine.runner.find_checkpoint import check_checkpoint_file
from mila_mm.engine.runner.runner import build_runner
from mila_mm.engine.screen import SummaryHook
from mila_mm.errors import UserError

_PICKLES = ('.pkl', '.pickle')


def test(
    config: str,
    checkpoint: str,
    *,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
    tta: bool = False,
    launcher: str = 'none',
    check: bool = True,
    hooks: Sequence[Hook] = (),
    cfg_options: Sequence[str] = (),
) -> dict[str, float]:
    """Test a checkpoint as a config's ``test_dataloader`` and ``test_evaluator`` say.

    Args:
        config: Path of a config, or ``mmdet::`` / ``mmseg::`` and a path there.
        checkpoint: File or address of the weights; they must fit the config's model key by key.
        work_dir: Folder for the log. Defaults to ``./work_dirs/NAME_OF_THE_CONFIG``.
        out: Pickle for the predictions; for a segmentor also a folder for label maps as PNG.
        show: Whether to open a window for each image. Defaults to False.
        show_dir: Folder for a picture of each image's predictions.
        wait_time: Seconds that a window stays. Defaults to 2.
        tta: Whether to use the config's ``tta_model`` and ``tta_pipeline``. Defaults to False.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'. Defaults to 'none'.
        check: Whether to check config and data before the first image. Defaults to True.
        hooks: More hooks, such as one that keeps the predictions. Defaults to none.
        cfg_options: Overrides as ``key.of.entry=value``.

    Raises:
        UserError: For anything in the arguments, the config or the data that does not work.
    """
    cfg = load_config(config, cfg_options)
    scope = scope_of(cfg)
    set_work_dir(cfg, work_dir)
    # mmpretrain's configs write test_cfg = dict()
    missing = [name for name in ('test_dataloader', 'test_cfg', 'test_evaluator') if cfg.get(name) is None]
    if missing:
        refuse_old(cfg)
        raise UserError(f'config {config} cannot be tested: it has no {", ".join(missing)}')
    check_checkpoint_file(checkpoint, 'CHECKPOINT')
    check_data(cfg, ['test'])
    cfg.load_from = checkpoint
    cfg.resume = False
    _leave_out_training(cfg)
    if out is not None:
        _add_dump(cfg, scope, out)
    if show or show_dir is not None:
        _add_drawing(cfg, scope, show, show_dir, wait_time)
    checking = checked_start(cfg, ['test'], scope, launcher) if check else None
    _tell_by_class(cfg)
    if tta:
        _use_tta(cfg)
    fetch_weights(cfg)
    prepare_launch(cfg, launcher)
    prepare(cfg, scope)
    with plain_failures():
        runner = build_runner(cfg)
        runner.register_hook(SummaryHook())
        for hook in (*hooks, *([checking] if checking is not None else [])):
            runner.register_hook(hook)
        with naming_parts(runner):
            return runner.test()


# pytest would take a function of this name for a test wherever it is imported
test.__test__ = False  # type: ignore[attr-defined]


def _tell_by_class(cfg: Config) -> None:
    """Let COCO's metric print the AP of each class, as that of segmentors prints each class's IoU."""
    for _, metric in metrics_of(cfg, 'test'):
        if kind_name(metric) in COCO_METRICS:
            metric.setdefault('classwise', True)


def _add_dump(cfg: Config, scope: str, out: str) -> None:
    """Add the writing of predictions to a config.

    Args:
        out: A path that ends with ``.pkl`` or ``.pickle``; for mmseg also a folder.

    Raises:
        UserError: If the path cannot be used.
    """
    path = Path(out).absolute()
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if out.endswith(_PICKLES):
        if path.is_dir():
            raise UserError(f'--out {out} is a folder, expected a file to write')
        kind = {'mmdet': 'DumpDetResults', 'mmseg': 'DumpSegResults', 'mmpretrain': 'DumpResults'}[scope]
        check_work_dir(path.parent, '--out')
        cfg.test_evaluator = [*metrics, dict(type=kind, out_file_path=str(path))]
    elif scope == 'mmseg' and not path.suffix and not path.is_file():
        check_work_dir(path, '--out')
        for metric in metrics:
            metric['output_dir'] = str(path)
    else:
        folder = ' or, for a segmentor, a folder' if scope == 'mmseg' else ''
        raise UserError(f'--out {out}: expected a file that ends with .pkl or .pickle{folder}')


def _add_drawing(cfg: Config, scope: str, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Add the drawing of predictions to a config.

    Raises:
        UserError: If there is no display to show on, the folder is a file, or there is nothing to draw.
    """
    if scope == 'mmpretrain':
        raise UserError('--show, --show-dir: a classifier predicts nothing to draw; --out FILE.pkl keeps its scores')
    if show and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')) and os.name == 'posix':
        raise UserError('--show needs a display, and DISPLAY is not set; --show-dir DIR writes the pictures instead')
    if show_dir is not None and Path(show_dir).is_file():
        raise UserError(f'--show-dir {show_dir} is a file, expected a folder')
    if show_dir is not None:
        check_work_dir(show_dir, '--show-dir')
    configured = (cfg.get('default_hooks') or {}).get('visualization') or {}
    options = {'pred_score_thr': configured.get('score_thr', 0.3)} if scope == 'mmdet' else {}
    hook = dict(
        type='mila_mm.PredictionDrawHook',
        out_dir=None if show_dir is None else str(Path(show_dir).absolute()),
        show=show,
        wait_time=wait_time,
        draw_options=options,
    )
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


def _use_tta(cfg: Config) -> None:
    """Wrap a config's model and pipeline for test-time augmentation.

    Raises:
        UserError: If it lacks them, or its model predicts masks, which mmdet cannot merge.
    """
    missing = [name for name in ('tta_model', 'tta_pipeline') if not cfg.get(name)]
    if missing:
        raise UserError(
            f'--tta: the config has no {" and no ".join(missing)}\n'
            'Add them to the config as described in the docs of mmdet (DetTTAModel) or mmseg (SegTTAModel).'
        )
    kind = str(cfg.tta_model.get('type')).rpartition('.')[2]
    if kind == 'DetTTAModel' and _predicts_masks(cfg.model):
        raise UserError(
            '--tta: mmdet merges augmented boxes but not masks, and the model predicts masks\n'
            'Boxes alone: --cfg-options model.roi_head.mask_head=None load_strict=False test_evaluator.metric=bbox'
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def _predicts_masks(model: dict[str, Any]) -> bool:
    roi_head = model.get('roi_head') or {}
    return any(head.get('mask_head') for head in (model, roi_head) if isinstance(head, dict))


def _leave_out_training(cfg: Config) -> None:
    """Take out what only training and validation need, so that their data may be missing."""
    for name in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        cfg[name] = None
    for name in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[name] = None


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """Dump a segmentor's label maps to a pickle, one dict per image.

    mmengine's class would keep the logits of all images in memory and write them: 0.6 GB per
    megapixel for the 150 classes of ADE20K. The label map is what evaluation reads.

    Args:
        out_file_path: Path that ends with ``.pkl`` or ``.pickle``.
        collect_device: Where ranks gather, 'cpu' or 'gpu'. Defaults to 'cpu'.
        collect_dir: Folder through which ranks gather. Defaults to None.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the predictions of a batch on the CPU.

        Args:
            data_samples: Samples as dicts, with ``pred_sem_seg``.
        """
        kept = [
            {key: value for key, value in sample.items() if key not in ('seg_logits', 'gt_sem_seg')}
            for sample in data_samples
        ]
        super().process(data_batch, kept)
