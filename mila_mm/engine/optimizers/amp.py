"""Mixed precision of a training run: which dtype where, and the optimizer wrapper that does it on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device, is_cuda_available, is_mlu_available, is_musa_available, is_npu_available
from mmengine.optim import AmpOptimWrapper as MMEngineAmpOptimWrapper
from mmengine.optim import OptimWrapper
from torch import nn

from mila_mm.errors import UserError
from mila_mm.registry import OPTIM_WRAPPERS

AMP_WRAPPER = 'mila_mm.AmpOptimWrapper'
_PLAIN_WRAPPERS = ('OptimWrapper', 'AmpOptimWrapper', AMP_WRAPPER)
_DTYPES = {
    'bf16': torch.bfloat16,
    'bfloat16': torch.bfloat16,
    'fp16': torch.float16,
    'float16': torch.float16,
}


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(MMEngineAmpOptimWrapper):
    """Mixed precision by autocast, with loss scaling where fp16 needs it.

    Differences to mmengine's: it runs on a CPU as well, bf16 is the default where the device has it, bf16 (which
    has fp32's range) goes without loss scaling, and a checkpoint of one dtype resumes under the other. Parameters,
    gradients and the optimizer's state stay in fp32.

    Args:
        dtype: 'bf16' (or 'bfloat16'), 'fp16' (or 'float16'), a torch dtype, or None for :func:`default_dtype`.
            Defaults to None.
        loss_scale: For fp16: 'dynamic', a fixed number, or the arguments of :class:`torch.amp.GradScaler`.
            Defaults to 'dynamic'.
        use_fsdp: Whether the parameters are sharded, so that all ranks must agree on a skipped step.
            Defaults to False.
        **kwargs: As for :class:`mmengine.optim.OptimWrapper`.

    Raises:
        UserError: If ``dtype`` or ``loss_scale`` is none of these.
    """

    def __init__(
        self,
        dtype: str | torch.dtype | None = None,
        loss_scale: str | float | dict[str, Any] = 'dynamic',
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        # Not the parent's: it refuses to be made on a CPU, and makes a scaler for a GPU.
        OptimWrapper.__init__(self, **kwargs)
        self.device_type = get_device()
        self.cast_dtype = _parse_dtype(dtype) if dtype is not None else default_dtype(self.device_type)
        self._scale_update_param: float | None = None
        options: dict[str, Any] = {}
        if isinstance(loss_scale, dict):
            options = dict(loss_scale)
        elif isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool) and loss_scale > 0:
            self._scale_update_param = float(loss_scale)
            options = dict(init_scale=float(loss_scale))
        elif loss_scale != 'dynamic':
            raise UserError(
                f"optim_wrapper.loss_scale: expected 'dynamic', a positive number or a dict, got {loss_scale!r}"
            )
        self.loss_scaler = _scaler_type(use_fsdp)(
            device=self.device_type, enabled=self.cast_dtype == torch.float16, **options
        )
        if not self.loss_scaler.is_enabled():
            self._scale_update_param = None

    def step(self, **kwargs: Any) -> None:
        """Clip, step and update the loss scale, which goes into the log."""
        super().step(**kwargs)
        if self.loss_scaler.is_enabled():
            self.message_hub.update_scalar('train/loss_scale', self.loss_scaler.get_scale())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, also from a run in another precision.

        Args:
            state_dict: What :meth:`state_dict` returned, there or in mmengine's wrappers.
        """
        if not state_dict.get('loss_scaler') or not self.loss_scaler.is_enabled():
            state_dict = {key: value for key, value in state_dict.items() if key != 'loss_scaler'}
        super().load_state_dict(state_dict)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Cast inside, and leave gradients unsynchronised where accumulation goes on."""
        with OptimWrapper.optim_context(self, model), torch.autocast(self.device_type, dtype=self.cast_dtype):
            yield


def _scaler_type(use_fsdp: bool) -> type:
    if use_fsdp:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler
    return torch.amp.GradScaler


def _parse_dtype(dtype: str | torch.dtype, where: str = 'optim_wrapper.dtype') -> torch.dtype:
    """Turn a name of a 16-bit dtype into the dtype.

    Args:
        dtype: 'bf16', 'bfloat16', 'fp16', 'float16', or the dtype itself.
        where: What the user wrote it in, for the message.

    Returns:
        ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        UserError: If it is none of these.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float16):
        raise UserError(f'{where}: expected bf16 or fp16, got {dtype}')
    return found


def default_dtype(device: str) -> torch.dtype:
    """Return the 16-bit dtype to train in on a device.

    Returns:
        bf16 on a CPU and on a GPU that computes in it (compute capability 8.0 and later), fp16 elsewhere.
    """
    if device == 'cuda':
        # A GPU before Ampere emulates bf16, slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device == 'cpu' else torch.float16


def configured_amp(cfg: Config) -> str | None:
    """Read the ``amp`` of a config, which the fragments ``configs/_base_/amp_*.py`` set.

    Returns:
        None where it asks for nothing, else 'auto', 'bf16' or 'fp16'.

    Raises:
        UserError: If it is something else.
    """
    amp = cfg.get('amp')
    if not amp:
        return None
    if amp is True or amp == 'auto':
        return 'auto'
    _parse_dtype(amp, "amp (expected True, 'auto', 'bf16' or 'fp16')")
    return str(amp)


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Turn a config's optimizer wrapper into the one for automatic mixed precision.

    Args:
        cfg: Config to change.
        dtype: 'bf16', 'fp16' or a longer name of one, 'auto' or None for the device's default. Defaults to None.

    Raises:
        UserError: If the config's wrapper is of a kind that cannot be turned.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in _PLAIN_WRAPPERS:
        raise UserError(f'--amp: expected optim_wrapper.type OptimWrapper or AmpOptimWrapper, got {kind}')
    cfg.optim_wrapper.type = AMP_WRAPPER
    if dtype not in (None, 'auto'):
        cfg.optim_wrapper.dtype = dtype


def check_precision(cfg: Config) -> None:
    """Check that the device can do what the optimizer wrapper asks for.

    Raises:
        UserError: If it asks for fp16 where there is no accelerator, or for bf16 where the GPU has none.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type')
    has_accelerator = is_cuda_available() or is_npu_available() or is_mlu_available() or is_musa_available()
    advice = 'take --amp-dtype bf16, or leave --amp out to train in fp32'
    if kind == 'AmpOptimWrapper' and not has_accelerator:
        raise UserError(
            "mmengine's optim_wrapper.type=AmpOptimWrapper needs a GPU, and torch finds none here\n"
            f'On the CPU bf16 works through {AMP_WRAPPER}: --amp --amp-dtype bf16; or train in fp32.'
        )
    if kind != AMP_WRAPPER or wrapper.get('dtype') is None:
        return
    dtype = _parse_dtype(wrapper.dtype)
    if dtype == torch.float16 and not has_accelerator:
        raise UserError(
            f'--amp-dtype fp16 needs a GPU, and torch finds none here\nOn the CPU {advice}; what '
            '`python -m torch.utils.collect_env` says of CUDA tells why no GPU is found.'
        )
    if dtype == torch.bfloat16 and is_cuda_available() and default_dtype('cuda') != torch.bfloat16:
        raise UserError(
            f'--amp-dtype bf16: {torch.cuda.get_device_name()} has no bf16, expected compute capability 8.0\n'
            'Take --amp-dtype fp16, which scales the loss by itself.'
        )
