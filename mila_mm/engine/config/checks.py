"""What can be seen to be wrong before anything is built: files, folders, launchers, precision."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mila_mm.engine.data.splits import leaf_datasets
from mila_mm.errors import UserError, printable

_ROOM = 1 << 20  # bytes: less than any log and checkpoint of a run take


@dataclass(frozen=True)
class Source:
    """Where a public data set comes from and how it lies on disk."""

    name: str
    address: str
    layout: str


_SOURCES = {
    'coco': Source(
        'COCO 2017',
        'https://cocodataset.org/#download',
        '{annotations/instances_{train,val}2017.json,train2017/,val2017/}',
    ),
    'ade': Source(
        'ADE20K',
        'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
        '{images,annotations}/{training,validation}/',
    ),
    'imagenet': Source('ImageNet-1K', 'https://image-net.org/download.php', '{train,val}/CLASS/IMAGE.JPEG'),
    'cityscapes': Source(
        'Cityscapes', 'https://www.cityscapes-dataset.com/downloads', '{leftImg8bit,gtFine}/{train,val}/'
    ),
}


@dataclass(frozen=True)
class NeededPath:
    """A file or folder that a config names.

    Attributes:
        key: Where the config names it, as ``--cfg-options`` would.
        path: The path, joined with the data root.
        is_folder: Whether a folder is expected.
        dataset: Config of the dataset it belongs to, None for a metric.
    """

    key: str
    path: Path
    is_folder: bool
    dataset: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """What is expected there, in words."""
        return 'folder' if self.is_folder else 'annotation file'

    def exists(self) -> bool:
        """Tell whether it is there."""
        return self.path.is_dir() if self.is_folder else self.path.is_file()


def check_data(cfg: Config, stages: Sequence[str]) -> None:
    """Check that the files and folders of the datasets and metrics exist.

    Only local paths are looked at, those that a file backend (``backend_args``) serves are not.

    Args:
        cfg: Config with ``{stage}_dataloader`` and ``{stage}_evaluator``.
        stages: Some of 'train', 'val', 'test'.

    Raises:
        UserError: For the first path that is missing: what, where, and how to get it.
    """
    for stage in stages:
        for needed in needed_paths(cfg, stage):
            if needed.exists():
                continue
            where = '' if needed.path.is_absolute() else f' (looked in {Path.cwd()})'
            if needed.path.is_symlink():
                raise UserError(f'{needed.key}: {needed.kind} {needed.path} is a link that leads nowhere{where}.')
            raise UserError(f'{needed.key}: {needed.kind} {needed.path} does not exist{where}.\n{_how_to_get(needed)}')


def needed_paths(cfg: Config, stage: str) -> Iterator[NeededPath]:
    """Go through the local files and folders that the data sets and metrics of a stage name."""
    loader = cfg.get(f'{stage}_dataloader')
    if isinstance(loader, dict) and isinstance(loader.get('dataset'), dict):
        for key, dataset in leaf_datasets(loader['dataset'], f'{stage}_dataloader.dataset'):
            yield from _paths_of_dataset(key, dataset)
    evaluators = cfg.get(f'{stage}_evaluator')
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    for evaluator in evaluators:
        if isinstance(evaluator, dict) and evaluator.get('ann_file') and not evaluator.get('backend_args'):
            path = str(evaluator['ann_file'])
            if '://' not in path:
                yield NeededPath(f'{stage}_evaluator.ann_file', Path(path), is_folder=False)


def _paths_of_dataset(key: str, dataset: dict[str, Any]) -> Iterator[NeededPath]:
    root = str(dataset.get('data_root') or '')
    if dataset.get('backend_args') or '://' in root:
        return
    if root:
        yield NeededPath(f'{key}.data_root', Path(root), is_folder=True, dataset=dataset)
    annotation = dataset.get('ann_file')
    if isinstance(annotation, str) and annotation and '://' not in annotation:
        # An absolute path replaces the root, here as in mmengine's datasets. mmseg takes a folder as well.
        path = Path(root, annotation)
        yield NeededPath(f'{key}.ann_file', path, is_folder=path.is_dir(), dataset=dataset)
    reads_labels = 'LoadAnnotations' in str(dataset.get('pipeline', ''))
    prefixes = dataset.get('data_prefix') or {}
    # mmpretrain also takes a string, for its only prefix.
    for name, prefix in ({'img_path': prefixes} if isinstance(prefixes, str) else prefixes).items():
        if not isinstance(prefix, str) or '://' in prefix or not (root or prefix):
            continue
        if 'seg' in name and not reads_labels:
            continue
        yield NeededPath(f'{key}.data_prefix.{name}', Path(root, prefix), is_folder=True, dataset=dataset)


def _how_to_get(needed: NeededPath) -> str:
    option = f'set {needed.key} with --cfg-options'
    if needed.dataset is None:
        return f'A metric compares with it: {option} to the file that its dataset reads.'
    name = str(needed.dataset.get('type')).rpartition('.')[2].lower()
    root = needed.dataset.get('data_root') or 'data'
    for prefix, source in _SOURCES.items():
        if name.startswith(prefix):
            layout = f'{str(root).rstrip("/")}/{source.layout}'
            get = f'Get {source.name} from {source.address}, lay it out as {layout}'
            return f'{get}, or {option}; `make demo` needs no data set.'
    return f'Put the data there, or {option}; `make demo` needs no data.'


def check_pretrained(model: Any, key: str = 'model') -> None:
    """Check that the local files named by ``init_cfg=dict(type='Pretrained', checkpoint=...)`` exist.

    Args:
        key: Where it stands in the config. Defaults to 'model'.

    Raises:
        UserError: If one does not exist.
    """
    if isinstance(model, dict):
        checkpoint = model.get('checkpoint')
        is_local = isinstance(checkpoint, str) and '://' not in checkpoint
        if model.get('type') == 'Pretrained' and is_local and not Path(checkpoint).expanduser().is_file():
            raise UserError(f'{key}.checkpoint: file {checkpoint} does not exist (looked in {Path.cwd()})')
        for name, value in model.items():
            check_pretrained(value, f'{key}.{name}')
    elif isinstance(model, (list, tuple)):
        for index, value in enumerate(model):
            check_pretrained(value, f'{key}.{index}')


def check_work_dir(work_dir: str | os.PathLike[str], flag: str = '--work-dir') -> None:
    """Check that files can be written to a folder, or that it can be made, and its disk has room; leave nothing behind.

    Args:
        work_dir: Folder, which may not exist yet.
        flag: What named it, for the message.

    Raises:
        UserError: If it cannot be written.
    """
    path = Path(work_dir).absolute()
    try:
        if '\0' in str(path):
            raise ValueError('it holds a NUL character')
        existing = next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())
        if not existing.is_dir():
            what = 'a link that leads nowhere' if existing.is_symlink() else 'a file'
            raise UserError(f'{flag} {printable(str(work_dir))}: {existing} is {what}, not a folder')
        limits = [os.pathconf(existing, 'PC_NAME_MAX'), os.pathconf(existing, 'PC_PATH_MAX')]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f'{flag} {printable(str(work_dir))}: cannot be a folder: {reason}') from error
    if max(len(os.fsencode(part)) for part in path.parts) > limits[0] or len(os.fsencode(path)) > limits[1]:
        raise UserError(f'{flag} {printable(str(work_dir))}: expected a name of at most {limits[0]} bytes')
    probe = existing / f'.mila_mm_probe_{uuid.uuid4().hex}'
    try:
        # os.access() says yes to root on a read-only file system
        probe.mkdir()
        try:
            with (probe / 'room').open('wb') as file:
                file.write(bytes(_ROOM))
                file.flush()
                os.fsync(file.fileno())  # a full disk, or a quota, may say so as late as this
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise UserError(f'{flag} {work_dir}: cannot write to {existing}: {error.strerror}') from error
