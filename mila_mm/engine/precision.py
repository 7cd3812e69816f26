"""Mixed precision of a training run."""

from mmengine.config import Config
from mmengine.device import is_cuda_available, is_mlu_available, is_musa_available, is_npu_available

from mila_mm.errors import UserError


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Turn a config's optimizer wrapper into the one for automatic mixed precision.

    Args:
        cfg: Config to change.
        dtype: 'float16' or 'bfloat16', None for the device's default. Defaults to None.

    Raises:
        UserError: If the config's wrapper is of a kind that cannot be turned.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp: expected optim_wrapper.type OptimWrapper or AmpOptimWrapper, got {kind}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if dtype is not None:
        cfg.optim_wrapper.dtype = dtype


def check_precision(cfg: Config) -> None:
    """Check that the device can do what the optimizer wrapper asks for.

    Args:
        cfg: Config of a training run.

    Raises:
        UserError: If it asks for mixed precision where there is no accelerator.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    has_accelerator = is_cuda_available() or is_npu_available() or is_mlu_available() or is_musa_available()
    if wrapper.get('type') == 'AmpOptimWrapper' and not has_accelerator:
        raise UserError(
            '--amp (optim_wrapper.type=AmpOptimWrapper) needs a GPU, and torch finds none here\n'
            'Leave --amp out to train in fp32 on the CPU, or see what `python -m torch.utils.collect_env` says of CUDA.'
        )
