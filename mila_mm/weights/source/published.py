"""The weights that MILA's authors published, by name.

The authors publish no checksum, so ``size`` and ``sha256`` are ``None`` here: what the first fetch
receives is recorded beside the file (:mod:`mila_mm.weights.source.cache`) and checked from then on.
Addresses: https://github.com/LeapLabTHU/MLLA (README files of the classifier, detection, segmentation).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mila_mm.errors import UserError

SCHEME = 'mila://'
_SHARE = 'https://cloud.tsinghua.edu.cn/f/{}/?dl=1'


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Attributes:
        name: What follows ``mila://``.
        task: ``'classification'``, ``'detection'`` or ``'segmentation'``.
        arch: ``'tiny'``, ``'small'`` or ``'base'``.
        url: The official address.
        layout: The key of the file that holds the state dict.
        prefix: What stands before the backbone's keys in that state dict.
        result: The published figure, for listings.
        size: Bytes of the file; ``None`` where it was never published.
        sha256: Hexadecimal digest of the file; ``None`` where it was never published.
    """

    name: str
    task: str
    arch: str
    url: str
    layout: str
    prefix: str
    result: str
    size: int | None = None
    sha256: str | None = None

    @property
    def filename(self) -> str:
        """Name of the file in the cache and on mirrors."""
        return f'mila-{self.name}.pth'

    @property
    def label(self) -> str:
        """What messages call this file."""
        return SCHEME + self.name


def _classifier(arch: str, share: str, top1: float) -> PublishedFile:
    return PublishedFile(
        name=f'{arch}-in1k',
        task='classification',
        arch=arch,
        url=_SHARE.format(share),
        layout='model',
        prefix='',
        result=f'ImageNet-1K top-1 {top1}',
    )


def _detector(arch: str, schedule: str, share: str, box_ap: float, mask_ap: float) -> PublishedFile:
    return PublishedFile(
        name=f'mask-rcnn-{arch}-{schedule}',
        task='detection',
        arch=arch,
        url=_SHARE.format(share),
        layout='state_dict',
        prefix='backbone.',
        result=f'COCO box AP {box_ap}, mask AP {mask_ap}',
    )


_FILES = (
    _classifier('tiny', '7a19712877cb4242889c', 83.5),
    _classifier('small', '0e5d0b1409d540aaa80c', 84.4),
    _classifier('base', '91c85c5a1061496d8796', 85.3),
    _detector('tiny', '1x', 'ce362e868fb5491ca55c', 46.8, 42.1),
    _detector('tiny', '3x', '339d49127565432fb912', 48.8, 43.8),
    _detector('small', '1x', '3d29bec850e0441a8842', 49.2, 44.2),
    _detector('small', '3x', 'b501c886982e4c7f926d', 50.5, 44.9),
    _detector('base', '1x', '826278b01bed4df2bbc1', 50.5, 45.0),
    PublishedFile(
        name='upernet-base-160k',
        task='segmentation',
        arch='base',
        url=_SHARE.format('41760d4a531a4ffc9cbf'),
        layout='state_dict',
        prefix='backbone.',
        result='ADE20K mIoU 51.9',
    ),
)

PUBLISHED: dict[str, PublishedFile] = {file.name: file for file in _FILES}


def find(name: str) -> PublishedFile:
    """Look a published file up.

    Args:
        name: With or without ``mila://``, e.g. ``'tiny-in1k'``.

    Raises:
        UserError: If there is none of that name; suggests the nearest.
    """
    bare = name.removeprefix(SCHEME)
    if bare in PUBLISHED:
        return PUBLISHED[bare]
    near = difflib.get_close_matches(bare, PUBLISHED, n=1, cutoff=0.5)
    hint = f'did you mean {SCHEME}{near[0]}? ' if near else ''
    raise UserError(f'no published weights are called {name!r}: {hint}known: {", ".join(PUBLISHED)}')
