"""Class names: of a config, of its splits, of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mila_mm.datasets.checks.findings import Finding, error, nearest, shown


def check_names(where: str, classes: Any) -> list[Finding]:
    """Check that class names are a list or tuple of strings that differ.

    Args:
        where: Key of the config.
        classes: What stands there.
    """
    if isinstance(classes, str):
        return [error(where, f'is the string {classes!r}, expected a tuple or list: ({classes!r},) with the comma')]
    if not isinstance(classes, (list, tuple)):
        return [error(where, f'expected a tuple or list of names, got {type(classes).__name__} {classes!r}')]
    if not classes:
        return [error(where, 'is empty: without a class there is nothing to learn')]
    others = [name for name in classes if not isinstance(name, str)]
    if others:
        return [error(where, f'expected names as strings, got {shown(others)}')]
    twice = (
        sorted({name for name in classes if list(classes).count(name) > 1}) if len(set(classes)) < len(classes) else []
    )
    return [error(where, f'names {shown(twice)} more than once; labels are positions in it')] if twice else []


def check_same_names(splits: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Check that all splits name the same classes in the same order.

    Args:
        splits: Key of the config to class names; the first one is compared with the others.
    """
    findings = []
    items = list(splits.items())
    for where, names in items[1:]:
        first_where, first = items[0]
        if list(names) == list(first):
            continue
        if set(names) == set(first):
            what = f'names the classes in another order than {first_where}: {shown(names)} and {shown(first)}'
        else:
            lacks = [name for name in first if name not in set(names)]
            has = [name for name in names if name not in set(first)]
            parts = [f'lacks {shown(lacks)}'] if lacks else []
            parts += [f'has {shown(has)} besides'] if has else []
            what = f'names {len(names)} classes, {first_where} names {len(first)}: it {" and ".join(parts)}'
        findings.append(error(where, f'{what}; a label means its position, so they must agree'))
    return findings


def check_categories(where: str, path: str, classes: Sequence[str], names: Sequence[str]) -> list[Finding]:
    """Check that a COCO file has every class, once, in the order of the classes.

    Loaders of COCO's kind number the categories in the file's order, whatever the order of the classes: a class that
    the file lacks moves all labels behind it.

    Args:
        where: Key of the classes.
        classes: The classes.
        names: Names of the file's categories, in its order.
    """
    if len(set(classes)) < len(classes):
        return []  # what is wrong with that is told by check_names
    absent = [name for name in classes if name not in set(names)]
    if not names:
        return [error(path, f"'categories' is empty, the config names {shown(list(classes))}")]
    if absent:
        if len(absent) == 1:
            what = f'class {absent[0]!r} is no category of {path}{nearest(absent[0], names)}'
        else:
            what = f'{len(absent)} of {len(classes)} classes are no category of {path}: {shown(absent)}'
            what += nearest(absent[0], names)
        if len(absent) == len(classes):
            what += f'; the file has {shown(list(names))}'
        return [error(where, f'{what}; labels behind a missing class would be shifted')]
    in_file = [name for name in names if name in set(classes)]
    if len(in_file) > len(set(in_file)):
        twice = sorted({name for name in in_file if in_file.count(name) > 1})
        return [error(path, f'categories names {shown(twice)} more than once')]
    if in_file != list(classes):
        first = next(i for i, (a, b) in enumerate(zip(classes, in_file, strict=True)) if a != b)
        return [
            error(
                where,
                f'is in another order than the categories of {path}, after which labels are numbered: position {first} '
                f'is {classes[first]!r} here and {in_file[first]!r} there; write classes in the order of the file',
            )
        ]
    return []
