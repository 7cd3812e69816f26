"""Objects in XML files of Pascal VOC's kind whose name is no class: the loader passes them over without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from mila_mm.datasets.checks.findings import Finding, error, nearest, note, shown, warning

_MUCH = 0.05


def check_object_names(where: str, files: Iterable[Path], classes: Sequence[str]) -> list[Finding]:
    """Count the objects of each name, and say which are of no class.

    Args:
        where: Key of the data set in the config.
        files: XML files; one that cannot be read is named.
        classes: Class names.
    """
    names: Counter[str] = Counter()
    first: dict[str, Path] = {}
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
        except OSError as fault:
            return [error(f'annotation file {path}', f'cannot be read: {fault.strerror}')]
        except ElementTree.ParseError as fault:
            return [error(f'annotation file {path}', f'is not valid XML: {fault}')]
        for item in root.findall('object'):
            name = item.findtext('name') or ''
            names[name] += 1
            first.setdefault(name, path)
    unknown = [name for name in names if name not in classes]
    if not unknown:
        return []
    lost, total = sum(names[name] for name in unknown), sum(names.values())
    text = (
        f'{lost} of {total} objects are of no class and are not used: {shown(unknown)} (first in {first[unknown[0]]})'
        f'{nearest(unknown[0], classes)}'
    )
    if lost == total:
        return [error(where, text)]
    absent = [name for name in classes if name not in names]
    return [(warning if absent and lost > _MUCH * total else note)(where, text)]
