"""The shapes set: scenes of overlapping shapes, with exact labels, as COCO and as ADE20K lay them out.

A folder of it serves both tasks from the same images::

    ROOT/shapes.json                             what was written, and its digest
    ROOT/images/{training,validation}/*.png
    ROOT/annotations/instances_{train,val}.json  COCO
    ROOT/annotations/{training,validation}/*.png ADE20K: 0 is unlabelled, k is class k - 1
"""

import hashlib
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np

from mila_mm.datasets.masks import encode_segmentation
from mila_mm.datasets.shapes_scene import GROUND, SHAPE_CLASSES, Scene, draw_scene
from mila_mm.errors import UserError

COCO_CLASSES = SHAPE_CLASSES
ADE_CLASSES = (*SHAPE_CLASSES, GROUND)

# Raised whenever the same arguments give other pixels or labels than before, so that an old folder is not reused.
_VERSION = 1
_MANIFEST = 'shapes.json'
_GENERATOR = 'mila_mm shapes'
# Held-out scenes have their own indices: no training set, however large, meets one of them.
FIRST_VAL_INDEX = 1_000_000
_SPLITS = {'train': 'training', 'val': 'validation'}


def write_shapes(root: str | Path, num_train: int, num_val: int, size: int = 128, seed: int = 0) -> Path:
    """Write the shapes set, or find that it is there already.

    The same arguments give the same pixels and the same bytes of annotation everywhere. The set
    is written beside ``root`` and moved there at the end, so a folder at ``root`` is always whole.

    Args:
        root: The folder. If it holds a shapes set made with other arguments, or a damaged one, that is replaced.
        num_train: Number of training images, 1 to ``FIRST_VAL_INDEX``.
        num_val: Number of held-out images, at least 1.
        size: Side of the square images in pixels, at least 32.
        seed: Seed of the set, at least 0.

    Raises:
        ValueError: If an argument is out of range or not a whole number.
        UserError: If there is something else at ``root``.
    """
    for name, value, low, high in (
        ('num_train', num_train, 1, FIRST_VAL_INDEX),
        ('num_val', num_val, 1, FIRST_VAL_INDEX),
        ('size', size, 32, 4096),
        ('seed', seed, 0, 2**32 - 1),
    ):
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f'write_shapes: {name} must be a whole number from {low} to {high}, got {value!r}')
    root = Path(root)
    made_with = {'version': _VERSION, 'num_train': num_train, 'num_val': num_val, 'size': size, 'seed': seed}
    if _is_whole(root, made_with):
        return root
    _check_replaceable(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}.part-', dir=root.parent) as scratch:
        part = Path(scratch) / 'new'
        part.mkdir()
        _write(part, made_with)
        _move_into_place(part, root, made_with)
    return root


def _is_whole(root: Path, made_with: dict) -> bool:
    """Tell whether the folder holds the set made with these arguments, with nothing missing or changed."""
    stored = _read_manifest(root)
    return stored is not None and stored == _manifest(root, made_with)


def _read_manifest(root: Path) -> dict | None:
    """Return what the folder says of itself; None where it is not a shapes set."""
    try:
        stored = json.loads((root / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and stored.get('generator') == _GENERATOR else None


def _manifest(root: Path, made_with: dict) -> dict:
    """Describe what the folder holds: every file's name and size, and the annotations' bytes, in one digest."""
    digest = hashlib.sha256()
    patterns = ('images/*/*.png', 'annotations/*/*.png', 'annotations/*.json')
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(f'{path.relative_to(root).as_posix()} {path.stat().st_size}\n'.encode())
        if path.suffix == '.json':
            digest.update(path.read_bytes())
    return {'generator': _GENERATOR, **made_with, 'files': digest.hexdigest()}


def _check_replaceable(root: Path) -> None:
    """Refuse to replace anything that is not a shapes set or an empty folder."""
    empty = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    if not empty and _read_manifest(root) is None:
        raise UserError(
            f'{root} exists and is not a shapes set (no {_MANIFEST} of {_GENERATOR} in it): it stays as it is. '
            'Name another folder, or remove this one.'
        )


def _move_into_place(part: Path, root: Path, made_with: dict) -> None:
    """Rename the finished folder to its place; what was there moves beside it, to go with the temporary folder."""
    try:
        if root.exists():
            root.replace(part.with_name('old'))
        part.replace(root)
    except OSError:
        # Another process was quicker; its set is as good as ours if it is the same.
        if not _is_whole(root, made_with):
            raise


def _write(folder: Path, made_with: dict) -> None:
    """Write the whole set into an empty folder."""
    for split, name in _SPLITS.items():
        first = 0 if split == 'train' else FIRST_VAL_INDEX
        images = folder / 'images' / name
        labels = folder / 'annotations' / name
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        coco = _empty_coco()
        for index in range(first, first + made_with[f'num_{split}']):
            scene = draw_scene(made_with['seed'], index, made_with['size'])
            file_name = f'{index:07d}.png'
            _write_png(images / file_name, scene.image[..., ::-1])
            _write_png(labels / file_name, _label_map(scene))
            _add_to_coco(coco, scene, index, file_name)
        # Bytes, not text: the same line ends on every platform.
        text = json.dumps(coco, separators=(',', ':')) + '\n'
        (folder / 'annotations' / f'instances_{split}.json').write_bytes(text.encode())
    text = json.dumps(_manifest(folder, made_with), indent=2) + '\n'
    (folder / _MANIFEST).write_bytes(text.encode())


def _write_png(path: Path, pixels: np.ndarray) -> None:
    # imencode and not imwrite, which only returns False where it cannot write.
    encoded = cv2.imencode('.png', pixels)[1]
    path.write_bytes(encoded.tobytes())


def _label_map(scene: Scene) -> np.ndarray:
    """Return ADE20K's label map of a scene, (size, size) uint8: k for ``ADE_CLASSES[k - 1]``; 0 does not occur."""
    labels = [ADE_CLASSES.index(GROUND) + 1, *(category + 1 for category in scene.categories)]
    return np.array(labels, dtype=np.uint8)[scene.instances]


def _empty_coco() -> dict:
    return {
        'info': {'description': 'Shapes: overlapping textured shapes, drawn by mila_mm', 'version': str(_VERSION)},
        'licenses': [],
        'images': [],
        'annotations': [],
        'categories': [
            {'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(COCO_CLASSES, start=1)
        ],
    }


def _add_to_coco(coco: dict, scene: Scene, index: int, file_name: str) -> None:
    """Add an image and its visible shapes."""
    height, width = scene.instances.shape
    coco['images'].append({'id': index, 'file_name': file_name, 'width': width, 'height': height})
    for number, category in enumerate(scene.categories, start=1):
        mask = scene.instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        coco['annotations'].append(
            {
                'id': len(coco['annotations']) + 1,  # from 1: to COCO's evaluation a match with id 0 is no match
                'image_id': index,
                'category_id': category + 1,
                'segmentation': encode_segmentation(mask),
                'area': int(mask.sum()),
                'bbox': [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                'iscrowd': 0,
            }
        )
