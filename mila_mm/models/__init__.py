"""MILA's models and their layers."""

from ..weights.loaders import register_loaders
from .arch import ARCHS, Arch, resolve_arch
from .mila import MILA
from .trunk import MILATrunk

__all__ = ['ARCHS', 'MILA', 'Arch', 'MILATrunk', 'resolve_arch']

# From here on checkpoints are read without running code, in the tools of mmdet and mmseg as well.
register_loaders()
