"""MILA's models and their layers."""

from .arch import ARCHS, Arch, resolve_arch
from .classifier import MILAClassifier
from .study import STUDY_ROWS, LinearAttentionClassifier, LinearAttentionTrunk
from .trunk import MILATrunk

__all__ = ['ARCHS', 'MILA', 'STUDY_ROWS', 'Arch', 'LinearAttentionClassifier', 'LinearAttentionTransformer',
           'LinearAttentionTrunk', 'MILAClassifier', 'MILAImageClassifier', 'MILATrunk', 'TiledSegmentor',
           'resolve_arch']

try:
    from .image_classifier import MILAImageClassifier
    from .mila import MILA
    from .study.transformer import LinearAttentionTransformer
    from .tiled import TiledSegmentor
except ModuleNotFoundError as error:
    # Without OpenMMLab the trunk alone is there, for plain PyTorch; asking for MILA says what is missing.
    if error.name is None or error.name.partition('.')[0] not in ('mmengine', 'mmcv'):
        raise
    _missing = error.name

    def __getattr__(name: str) -> object:
        if name in ('MILA', 'MILAImageClassifier', 'LinearAttentionTransformer', 'TiledSegmentor'):
            raise ModuleNotFoundError(f'mila_mm.models.{name}: expected {_missing} to be installed, found none; '
                                      f"pip install 'mila-mm[onedl]', or use mila_mm.models.MILATrunk", name=_missing)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
else:
    from ..weights import register_loaders

    register_loaders()  # from now on mmengine reads checkpoints without running code in them
