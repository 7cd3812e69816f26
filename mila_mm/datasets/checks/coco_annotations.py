"""Annotation files in COCO's layout: whether each entry is well-formed."""

from __future__ import annotations

import gc
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mila_mm.datasets.checks.coco_masks import check_mask
from mila_mm.datasets.checks.faults import Faults, are_numbers, is_number
from mila_mm.datasets.checks.findings import ERROR, WARNING, Finding, brief, error, shown
from mila_mm.datasets.checks.needs import Needs

NO_IMAGES = "'images' is empty"

# What a file begins with that is no JSON in UTF-8, and how that is told.
_OTHER_KINDS = {
    b'\xef\xbb\xbf': 'begins with a byte order mark, which pycocotools refuses: save it as UTF-8 without BOM',
    b'\xff\xfe': 'is text in UTF-16, expected UTF-8: save it again',
    b'\xfe\xff': 'is text in UTF-16, expected UTF-8: save it again',
    b'\x1f\x8b': 'is compressed with gzip, whatever its name says: unpack it',
    b'PK\x03\x04': 'is a zip archive, whatever its name says: unpack it',
    b'version https://git-lfs': 'is a pointer of Git LFS, not the file: git lfs pull fetches that',
}
_SECTIONS = ('images', 'annotations', 'categories')


class UnreadableError(Exception):
    """An annotation file that is no JSON or has another layout; the message is the rest of a sentence."""


class OtherLayoutError(UnreadableError):
    """A sound file in another layout than COCO's."""


def read_coco(path: Path) -> dict[str, Any]:
    """Read a file and check its outermost layout.

    Raises:
        UnreadableError: Said so that the message goes on after the file's name.
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise UnreadableError(f'cannot be read: {fault.strerror}') from fault
    told = next((said for start, said in _OTHER_KINDS.items() if content.startswith(start)), None)
    if told or not content.strip():
        raise UnreadableError(told or f'is empty ({len(content)} bytes)')
    try:
        text = content.decode()
        del content  # of a file as large as COCO's, half a gigabyte
        with _no_collection():
            data = json.loads(text, object_hook=_packed)
    except json.JSONDecodeError as fault:
        lines = fault.msg == 'Extra data' and text[fault.pos - 1 : fault.pos] == '\n'
        why = 'JSON lines, one object each? Those must be one object' if lines else 'cut short, or not JSON?'
        raise UnreadableError(
            f'is not valid JSON: {fault.msg} at line {fault.lineno}, column {fault.colno} ({why})'
        ) from fault
    except UnicodeDecodeError as fault:
        raise UnreadableError('is not valid JSON: it is not text in UTF-8') from fault
    if not isinstance(data, dict):
        raise UnreadableError(f"is not in COCO's layout: expected an object at its top, got a {_called(data)}")
    if isinstance(data.get('data_list'), list):
        raise OtherLayoutError(
            "is in mmengine's layout (metainfo, data_list), not in COCO's: its dataset is of type BaseDetDataset"
        )
    for section in _SECTIONS:
        if section == 'annotations' and section not in data:
            continue  # the images of a test server
        if not isinstance(data.get(section), list):
            raise UnreadableError(f"is not in COCO's layout: it has no list {section!r}")
    return data


def _packed(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep polygons as arrays, which take a quarter of the memory of lists; what is no list of numbers stays."""
    polygons = entry.get('segmentation')
    if isinstance(polygons, list):
        with suppress(TypeError, OverflowError):
            entry['segmentation'] = [
                array('d', polygon) if isinstance(polygon, list) else polygon for polygon in polygons
            ]
    return entry


def _called(data: Any) -> str:
    is_results = isinstance(data, list) and data and isinstance(data[0], dict) and 'category_id' in data[0]
    return 'list of annotations or results without images and categories' if is_results else type(data).__name__


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the cyclic garbage collector from walking through millions of fresh objects that hold no cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_entries(data: dict[str, Any], path: str, needs: Needs) -> list[Finding]:
    """Check each image, category and annotation of a file by itself and the ids between them.

    Args:
        data: Content of the file, as :func:`read_coco` returns it.
        path: The file, for messages.
        needs: What is done with it.

    Returns:
        One finding for each kind of fault, with the first entry and field and how many are like it.
    """
    faults = Faults(path)
    images = _check_images(data['images'], faults)
    categories = _check_categories(data['categories'], faults)
    if needs.labels and 'annotations' not in data:
        faults.add('no annotations', "is not in COCO's layout: it has no list 'annotations'")
    _check_annotations(data.get('annotations', []), images, categories, needs, faults)
    if not data['images']:
        faults.first.pop('no image', None)  # that follows from it
    found = faults.findings()
    # A file without images is nothing to train on, but what is wrong with its entries is told first.
    if not data['images'] and not any(finding.level == ERROR for finding in found):
        found.append(error(path, NO_IMAGES))
    return found


def _check_images(images: Sequence[Any], faults: Faults) -> dict[Any, tuple[int, int]]:
    """Return the size (height, width) of each image by its id."""
    sizes: dict[Any, tuple[int, int]] = {}
    kinds: Counter[str] = Counter()
    names: set[str] = set()
    for index, image in enumerate(images):
        here = f'images[{index}]'
        if not isinstance(image, dict):
            faults.add('image', f'{here} is {brief(image)}, expected an object')
            continue
        absent = [name for name in ('id', 'file_name', 'height', 'width') if name not in image]
        if absent:
            faults.add(f'image no {absent[0]}', f'{here} has no {absent[0]!r}')
            continue
        height, width, number = image['height'], image['width'], image['id']
        if not isinstance(image['file_name'], str) or not image['file_name']:
            faults.add('file_name', f'{here}.file_name is {brief(image["file_name"])}, expected the name of a file')
        elif image['file_name'] in names:
            said = f'{here}.file_name {brief(image["file_name"])} has been that of another image already'
            faults.add('file_name twice', said, 'warning')
        else:
            names.add(image['file_name'])
        if not (is_number(height) and is_number(width) and height > 0 and width > 0):
            faults.add(
                'image size',
                f'{here} ({brief(image["file_name"])}) has width {brief(width)} and height {brief(height)}, expected '
                'those of the image in pixels: without them every box counts as outside',
            )
            height = width = 0
        if not isinstance(number, (int, str)) or isinstance(number, bool):
            faults.add('image id', f'{here}.id is {brief(number)}, expected a number')
            continue
        kinds[type(number).__name__] += 1
        if number in sizes:
            faults.add('image twice', f'{here}.id {brief(number)} has been that of another image already')
        sizes[number] = (height, width)
    if len(kinds) > 1:
        faults.add('image ids', f'ids of images are of different types: {_kinds(kinds)}')
    return sizes


def _kinds(kinds: Counter[str]) -> str:
    return ', '.join(f'{count} {kind}' for kind, count in kinds.items())


def _check_categories(categories: Sequence[Any], faults: Faults) -> set[Any]:
    ids: set[Any] = set()
    for index, category in enumerate(categories):
        here = f'categories[{index}]'
        absent = [name for name in ('id', 'name') if not isinstance(category, dict) or name not in category]
        if absent:
            faults.add(f'category no {absent[0]}', f'{here} has no {absent[0]!r}')
            continue
        if not isinstance(category['id'], int) or isinstance(category['id'], bool):
            faults.add('category id', f'{here}.id is {brief(category["id"])}, expected a whole number')
            continue
        if category['id'] in ids:
            faults.add('category twice', f'{here}.id {category["id"]} has been that of another category already')
        ids.add(category['id'])
        if not isinstance(category['name'], str):
            faults.add('category name', f'{here}.name is {brief(category["name"])}, expected a string')
    return ids


def _check_annotations(
    annotations: Sequence[Any], images: dict[Any, tuple[int, int]], categories: set[Any], needs: Needs, faults: Faults
) -> None:
    ids: set[Any] = set()
    unknown: Counter[Any] = Counter()
    unknown_at: dict[Any, int] = {}
    astray: list[int] = []
    no_crowd, no_area = [], []
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            faults.add('annotation', f'annotations[{index}] is {brief(annotation)}, expected an object')
            continue
        absent = [name for name in ('id', 'image_id', 'category_id', 'bbox') if name not in annotation]
        if absent:
            faults.add(f'annotation no {absent[0]}', f'annotations[{index}] has no {absent[0]!r}')
            continue
        _check_id(index, annotation['id'], ids, needs, faults)
        _check_references(index, annotation, images, categories, unknown, unknown_at, astray, faults)
        bbox = annotation['bbox']
        if not are_numbers(bbox) or len(bbox) != 4 or bool in map(type, bbox):
            faults.add('bbox', f'annotations[{index}].bbox is {brief(bbox)}, expected [x, y, width, height]')
        if 'area' not in annotation:
            no_area.append(index)
        elif not is_number(annotation['area']):
            faults.add('area', f'annotations[{index}].area is {brief(annotation["area"])}, expected a number')
        if 'iscrowd' not in annotation:
            no_crowd.append(index)
        elif annotation['iscrowd'] not in (0, 1):
            faults.add('iscrowd', f'annotations[{index}].iscrowd is {brief(annotation["iscrowd"])}, expected 0 or 1')
        check_mask(index, annotation, images, needs, faults)
    if astray and not any(kind.startswith('image') for kind in faults.first):  # what those lack is told already
        _say_astray(astray, annotations, images, faults)
    if unknown:
        _say_unknown_categories(unknown, unknown_at, len(annotations), categories, faults)
    _say_absent(no_area, no_crowd, len(annotations), faults)


def _check_id(index: int, number: Any, ids: set[Any], needs: Needs, faults: Faults) -> None:
    if number == 0 and needs.evaluation:  # which takes the id of what was found for whether something was
        said = "COCO's evaluation never counts that object as found: number from 1"
        faults.add('id 0', f'annotations[{index}].id is 0; {said}', WARNING)
    if isinstance(number, str) and not number.isdecimal() and needs.evaluation:
        said = "expected a number: COCO's evaluation computes with it"
        faults.add('text id', f'annotations[{index}].id is {brief(number)}, {said}')
    if not isinstance(number, (int, str)) or isinstance(number, bool):
        faults.add('id', f'annotations[{index}].id is {brief(number)}, expected a number')
    elif number in ids:
        faults.add('twice', f'annotations[{index}].id {brief(number)} has been that of another one already')
    ids.add(number if isinstance(number, (int, str)) else str(number))


def _check_references(
    index: int,
    annotation: dict[str, Any],
    images: dict[Any, tuple[int, int]],
    categories: set[Any],
    unknown: Counter[Any],
    unknown_at: dict[Any, int],
    astray: list[int],
    faults: Faults,
) -> None:
    for name in ('image_id', 'category_id'):
        if not isinstance(annotation[name], (int, float, str)) or isinstance(annotation[name], bool):
            faults.add(name, f'annotations[{index}].{name} is {brief(annotation[name])}, expected a number')
            return
    if annotation['image_id'] not in images:
        astray.append(index)
    if annotation['category_id'] not in categories:
        unknown[annotation['category_id']] += 1
        unknown_at.setdefault(annotation['category_id'], index)


def _say_astray(
    astray: list[int], annotations: Sequence[Any], images: dict[Any, tuple[int, int]], faults: Faults
) -> None:
    """Say that annotations belong to no image: an error where none does, or where the types of ids differ."""
    image_id = annotations[astray[0]]['image_id']
    kind = next((type(number).__name__ for number in images if str(number) == str(image_id)), None)
    why = f'; ids of images are of type {kind}, this one is of type {type(image_id).__name__}' if kind else ''
    level = 'error' if kind or len(astray) == len(annotations) else 'warning'
    faults.add(
        'no image',
        f'annotations[{astray[0]}].image_id {image_id!r} is the id of no image ({len(astray)} of {len(annotations)} '
        f'annotations are like it and are not used){why}',
        level,
    )


def _say_unknown_categories(
    unknown: Counter[Any], unknown_at: dict[Any, int], total: int, categories: set[Any], faults: Faults
) -> None:
    """Say that annotations are of no category: an error where none is, or where ids seem shifted by one."""
    if not categories:
        if not faults.first:
            faults.add('no category', "'categories' is empty, every annotation is of one")
        return
    numbers, own = sorted(unknown, key=str), sorted(categories)
    whole = [number for number in numbers if isinstance(number, int)]
    shifted = bool(whole and own) and set(whole) <= {own[0] - 1, own[-1] + 1}
    why = (
        '; are they counted from 0 in one and from 1 in the other? All labels are shifted by one then'
        if shifted
        else ''
    )
    faults.add(
        'no category',
        f'annotations[{min(unknown_at.values())}].category_id is the id of no category ({sum(unknown.values())} of '
        f'{total} annotations, ids {shown(numbers)}; categories have {shown(own)}){why}',
        'error' if shifted or sum(unknown.values()) == total else 'warning',
    )


def _say_absent(no_area: list[int], no_crowd: list[int], total: int, faults: Faults) -> None:
    """Say what is computed; a few files that lack it here and there are likelier to lack it by mistake."""
    if no_area:
        faults.add(
            'no area',
            f'annotations[{no_area[0]}] has no "area" ({len(no_area)} of {total}): width * height of the box is taken, '
            'which moves AP by size where masks are compared',
            'warning',
        )
    if no_crowd:
        faults.add(
            'no iscrowd',
            f'annotations[{no_crowd[0]}] has no "iscrowd" ({len(no_crowd)} of {total}): taken for 0, no crowd',
            'warning',
        )
