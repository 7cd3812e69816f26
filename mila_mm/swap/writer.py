"""Write a swapped config as a short child of the original, with a comment on each change."""

from __future__ import annotations

import keyword
import math
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

from mmengine.config import Config

from mila_mm.engine.config.load import load_config, one_line
from mila_mm.errors import UserError
from mila_mm.files import move_into_place
from mila_mm.swap.result import ABSENT, Path, SwapResult
from mila_mm.swap.source import base_name

_WIDTH = 119
_DELETE = '_delete_'


class _Same:
    """Stands for 'no difference'."""


_SAME = _Same()


def child_text(result: SwapResult, out: str | FilePath) -> str:
    """Write a swapped config as Python text that inherits from the original.

    Args:
        result: The swap of a config that was read from a file.
        out: Where the text will be; a path of the original is written relative to its folder.

    Raises:
        UserError: If the original is in memory only, or a changed value cannot be written.
    """
    if result.base is None:
        raise UserError('the config is in memory only: a child config needs a file to inherit from')
    lines = _wrapped(f'{result.title}, by tools/swap_backbone.py. {result.checked[0].upper()}{result.checked[1:]}.')
    if result.unknowns:
        lines.append('# Not known, or yours to decide:')
        for unknown in result.unknowns:
            lines += _wrapped(unknown, '- ')
    lines += [f'_base_ = {base_name(result.base, FilePath(out).parent)!r}', '']
    new = result.config._cfg_dict.to_dict()
    why = {change.path: change.why for change in result.changes}
    difference = _difference(result.original, new)
    if isinstance(difference, dict):
        for key, value in difference.items():
            lines += _entry(key, value, (key,), why, 0, top=True)
    return '\n'.join(lines).rstrip() + '\n'


def check_out(out: str | FilePath, config: str | None = None) -> None:
    """Check, before the work of a swap, that its config can be written to a file.

    Args:
        config: The original as it was given, None for a config in memory. One that cannot be read is not looked into:
            the swap says why.

    Raises:
        UserError: If the name does not fit a config, is a folder's, or is that of the original or of a file that it
            inherits from.
    """
    path = FilePath(out).expanduser()
    if path.suffix != '.py':
        raise UserError(f'--out {out}: expected a name that ends in .py')
    if path.is_dir():
        raise UserError(f'--out {out}: is a folder; expected the name of a file in it')
    # only a file that exists can be one of them
    files = _files_of(config) if config is not None and path.exists() else []
    if path.resolve() in files[-1:]:
        raise UserError(f'--out {out}: is the config itself; a child needs a file of its own')
    if path.resolve() in files:
        raise UserError(
            f'--out {out}: is a base of {config}, which would then inherit from itself; a child needs a file of its own'
        )


def _files_of(config: str) -> list[FilePath]:
    """Return the files that a config is made of, itself last; none where it cannot be read."""
    try:
        text = load_config(config, import_custom_modules=False).text
    except UserError:
        return []
    # mmengine puts the name of each file above its text
    lines = (FilePath(line) for line in text.splitlines() if os.path.isabs(line))
    return [path.resolve() for path in lines if path.is_file()]


def write_child(result: SwapResult, out: str | FilePath) -> None:
    """Write a swapped config to a file, and make sure that it reads back as what the swap made.

    Args:
        out: The file; an existing one is replaced, but only by a config that was read back.

    Raises:
        UserError: If it cannot be written, or would read back as something else; then nothing is left behind.
    """
    check_out(out, result.base)
    text = child_text(result, out)
    path = FilePath(out).expanduser()
    try:
        with _beside(path) as draft:
            draft.write_text(text, encoding='utf-8')
            check_child(result, draft, f'--out {out}: not written, since it')
            if path.exists():
                shutil.copymode(path, draft)
            move_into_place(draft, path)
    except OSError as error:
        raise UserError(f'--out {out}: cannot be written: {error.strerror}') from error


@contextmanager
def _beside(path: FilePath) -> Iterator[FilePath]:
    """Give a name for a draft beside a file, in a folder that is made; both go where the draft was not moved away."""
    missing = [folder for folder in path.parents if not folder.exists()]
    draft = path.with_name(f'.{path.stem}.{os.getpid()}.py')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
    except BaseException:
        draft.unlink(missing_ok=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def check_child(result: SwapResult, path: str | FilePath, what: str | None = None) -> None:
    """Read a written config and compare it with the swap's.

    Args:
        what: What a message calls it. Defaults to its path.

    Raises:
        UserError: If they differ; that happens where the original computes entries from others of its own.
    """
    what = what or str(path)
    try:
        read = Config.fromfile(path, import_custom_modules=False)._cfg_dict.to_dict()
    except Exception as error:
        raise UserError(f'{what} cannot be read back: {one_line(error)}') from error
    expected = result.config._cfg_dict.to_dict()
    wrong = [key for key in {*read, *expected} if not _same(read.get(key, _SAME), expected.get(key, _SAME))]
    if wrong:
        raise UserError(f'{what} reads back with other values of {", ".join(sorted(wrong))}')


def _same(one: Any, other: Any) -> bool:
    """Compare as ``==`` does, but for NaN, which is the same as NaN here."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return (
        one is other
        or one == other
        or (isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other))
    )


def _difference(old: Any, new: Any) -> Any:
    """Return what a child has to say so that its base becomes ``new``, :data:`_SAME` for nothing."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if any(key not in new for key in old) or ('type' in new and old.get('type') != new['type']):
            return {_DELETE: True, **new}
        parts = {key: _difference(old[key], value) if key in old else value for key, value in new.items()}
        parts = {key: part for key, part in parts.items() if part is not _SAME}
        return parts or _SAME
    if type(old) is type(new) and old == new:
        return _SAME
    if isinstance(new, Mapping):
        return {_DELETE: True, **new}
    return new


def _entry(key: str, value: Any, path: Path, why: Mapping[Path, str], depth: int, top: bool = False) -> list[str]:
    """Return the lines of one ``key=value``, its comment above or behind it."""
    pad = ' ' * 4 * depth
    comment = _comment(path, value, why)
    sign = ' = ' if top else '='
    end = '' if top else ','
    flat = f'{pad}{key}{sign}{_flat(value)}{end}'
    split = isinstance(value, dict) and any(len(p) > len(path) and p[: len(path)] == path for p in why)
    if not split and len(flat) <= _WIDTH:
        if comment and len(flat) + len(comment) + 4 <= _WIDTH:
            return [f'{flat}  # {comment}']
        return [*_wrapped(comment, indent=pad), flat]
    lines = _wrapped(comment, indent=pad)
    if isinstance(value, dict) and _are_names(value):
        lines.append(f'{pad}{key}{sign}dict(')
        for name, part in value.items():
            lines += _entry(name, part, (*path, name), why, depth + 1)
        return [*lines, f'{pad}){end}']
    return [*lines, *_broken(f'{pad}{key}{sign}', value, end, depth)]


def _broken(head: str, value: Any, end: str, depth: int) -> list[str]:
    """Return the lines of a value, on one where it fits, else one for each part."""
    flat = f'{head}{_flat(value)}{end}'
    if len(flat) <= _WIDTH or not isinstance(value, (dict, list, tuple)):
        return [flat]
    names = isinstance(value, dict) and _are_names(value)
    opening, closing = ('dict(', ')') if names else {dict: '{}', tuple: '()'}.get(type(value), '[]')
    pad = ' ' * 4 * (depth + 1)
    lines = [f'{head}{opening}']
    parts = value.items() if isinstance(value, dict) else [(None, part) for part in value]
    for name, part in parts:
        lead = '' if name is None else f'{name}=' if names else f'{name!r}: '
        lines += _broken(f'{pad}{lead}', part, ',', depth + 1)
    return [*lines, f'{" " * 4 * depth}{closing}{end}']


def _comment(path: Path, value: Any, why: Mapping[Path, str]) -> str:
    """Return the reasons for a value: its own and, where it is written whole, those of what is inside."""
    if path in why:
        return why[path]
    if isinstance(value, dict) and _DELETE not in value:
        return ''
    inner = {p: reason for p, reason in why.items() if p[: len(path)] == path}
    return '; '.join(f'{".".join(map(str, p[len(path) :]))}: {reason}' for p, reason in inner.items())


def _flat(value: Any) -> str:
    """Write a value on one line, as configs do."""
    if isinstance(value, dict):
        if _are_names(value):
            return f'dict({", ".join(f"{k}={_flat(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {_flat(v)}" for k, v in value.items())}}}'
    if isinstance(value, (list, tuple)):
        inner = ', '.join(map(_flat, value))
        if isinstance(value, list):
            return f'[{inner}]'
        return f'({inner},)' if len(value) == 1 else f'({inner})'
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise UserError(f'a changed part of the config holds a {type(value).__name__}, which cannot be written as text')


def _are_names(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value)


def _wrapped(text: str, bullet: str = '', indent: str = '') -> list[str]:
    first = f'{indent}# {bullet}'
    return (
        textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=first,
            subsequent_indent=f'{indent}# {" " * len(bullet)}',
            break_on_hyphens=False,
            break_long_words=False,
        )
        if text
        else []
    )


_LONGEST = 60


def report(result: SwapResult) -> str:
    """Describe a swap.

    Returns:
        A table of the changes, what could not be known, and what was checked.
    """
    rows = [('entry', 'was', 'is', 'because')]
    for change in result.changes:
        old, new = change.old, change.new
        if change.path[-1] == 'backbone':
            old, new = old.get('type'), f'{new["type"]} {new["arch"]}'
        rows.append((change.key, _short(old), _short(new), change.why))
    lines = [f'{result.title}', f'  was: {result.old_maps}', f'  is:  {result.new_maps}', '', *_table(rows)]
    if result.unknowns:
        lines += ['', 'not known, or yours to decide:']
        for unknown in result.unknowns:
            lines += textwrap.wrap(unknown, 116, initial_indent='  - ', subsequent_indent='    ')
    return '\n'.join([*lines, '', f'checked: {result.checked}'])


def _short(value: Any) -> str:
    text = '-' if value is ABSENT else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ['  '.join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
