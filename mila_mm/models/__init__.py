"""MILA's models and their layers."""

from .arch import ARCHS, Arch, resolve_arch
from .trunk import MILATrunk

__all__ = ['ARCHS', 'MILA', 'Arch', 'MILATrunk', 'resolve_arch']

try:
    from .mila import MILA
except ModuleNotFoundError as error:
    # Without OpenMMLab the trunk alone is there, for plain PyTorch; asking for MILA says what is missing.
    if error.name is None or error.name.partition('.')[0] not in ('mmengine', 'mmcv'):
        raise
    _missing = error.name

    def __getattr__(name: str) -> object:
        if name == 'MILA':
            raise ModuleNotFoundError(f'mila_mm.MILA: expected {_missing} to be installed, found none; '
                                      f"pip install 'mila-mm[onedl]', or use mila_mm.models.MILATrunk", name=_missing)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
else:
    from ..weights import register_loaders

    register_loaders()  # from now on mmengine reads checkpoints without running code in them
