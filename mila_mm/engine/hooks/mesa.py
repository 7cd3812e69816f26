"""MESA: averaged weights that the training is compared with."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from mila_mm.registry import HOOKS


@HOOKS.register_module()
class MESAHook(EMAHook):
    """Average the weights, and from a given epoch on add to the loss how far predictions are from the average's.

    Du et al., "Sharpness-Aware Training for Free" (NeurIPS 2022): with v <- (1 - momentum) v + momentum w after each
    step, the loss becomes L(w) + ratio * KL(f_v || f_w), see :func:`mila_mm.models.image_classifier.mesa_loss`. A
    model with large losses around it in weight space differs much from its average.

    Averages go on being kept, validated and saved as mmengine's ``EMAHook`` does it: a checkpoint's ``state_dict``
    holds the average, its ``ema_state_dict`` the weights of the last step. Running statistics are averaged like the
    weights. Needs a :class:`mila_mm.models.MILAImageClassifier`.

    Args:
        ratio: Weight of the divergence; 0 keeps the average alone. Defaults to 1.0.
        begin_mesa_epoch: Epoch, from 0, from whose beginning on it is added. Defaults to 75.
        momentum: Share of the newest weights in the average. Defaults to 4e-4.
        **kwargs: For mmengine's ``EMAHook``.

    Raises:
        ValueError: If ratio or epoch is negative.
    """

    def __init__(self, ratio: float = 1.0, begin_mesa_epoch: int = 75, momentum: float = 4e-4, **kwargs: Any) -> None:
        if ratio < 0 or begin_mesa_epoch < 0:
            raise ValueError(
                f'MESAHook: expected ratio and begin_mesa_epoch of at least 0, got {ratio!r} and {begin_mesa_epoch!r}'
            )
        super().__init__(momentum=momentum, **{'update_buffers': True, **kwargs})
        self.ratio = ratio
        self.begin_mesa_epoch = begin_mesa_epoch

    def before_run(self, runner: Runner) -> None:
        """Make the average."""
        super().before_run(runner)
        if not hasattr(self.src_model, 'set_average'):
            raise ValueError(
                f'MESAHook: expected a model of type mila_mm.MILAImageClassifier, got {type(self.src_model).__name__}'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Let the loss see the average once its epoch has come."""
        if self.ratio and runner.epoch >= self.begin_mesa_epoch:
            self.src_model.set_average(self.ema_model.module.eval(), self.ratio)
