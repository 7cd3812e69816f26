"""Curves of a run, drawn at its end."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mila_mm.registry import HOOKS

# What a picture has room for, the first that there are
_METRICS = ('bbox_mAP', 'segm_mAP', 'bbox_mAP_50', 'mIoU', 'mAcc', 'PQ', 'top1', 'AP')
_SHOWN = 3


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draw losses and metrics over the iterations into the run's log folder, ``curves.png``."""

    priority = 'LOWEST'

    def after_train(self, runner: Runner) -> None:
        """Draw what mmengine's JSON log holds; nothing where there is none."""
        log = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
        if not is_main_process() or not log.is_file():
            return
        from mila_mm.visualization import read_scalars, save_curves

        training, validation = read_scalars(log)
        if not training:
            return
        keys = [key for name in _METRICS for key in (validation[-1] if validation else ()) if _ends_with(key, name)]
        path = Path(runner.log_dir) / 'curves.png'
        save_curves(training, validation, {key: key for key in keys[:_SHOWN]}, path, title=runner.experiment_name)
        runner.logger.info(f'curves: {path}')


def _ends_with(key: str, name: str) -> bool:
    return key.rpartition('/')[2] == name
