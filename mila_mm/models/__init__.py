"""MILA as components of OpenMMLab: the backbone, an image classifier, a segmentor that works in tiles."""

from mila_mm.arch import ARCHS, Arch, resolve_arch
from mila_mm.nn.classifier import MILAClassifier
from mila_mm.nn.trunk import MILATrunk

__all__ = [
    'ARCHS',
    'MILA',
    'Arch',
    'MILAClassifier',
    'MILAImageClassifier',
    'MILATrunk',
    'TiledSegmentor',
    'resolve_arch',
]

try:
    from mila_mm.models.image_classifier import MILAImageClassifier
    from mila_mm.models.mila import MILA
    from mila_mm.models.tiled import TiledSegmentor
except ModuleNotFoundError as error:
    # Without OpenMMLab the trunk alone is there, for plain PyTorch; asking for MILA says what is missing.
    if error.name is None or error.name.partition('.')[0] not in ('mmengine', 'mmcv'):
        raise
    _missing = error.name

    def __getattr__(name: str) -> object:
        if name in ('MILA', 'MILAImageClassifier', 'TiledSegmentor'):
            raise ModuleNotFoundError(
                f'mila_mm.models.{name}: expected {_missing} to be installed, found none; '
                f"pip install 'mila-mm[onedl]', or use mila_mm.models.MILATrunk",
                name=_missing,
            )
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
