"""Write a swapped config as a short child of the original, with a comment on each change."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from mmengine.config import Config

from mila_mm.engine.config import one_line, resolve_config
from mila_mm.errors import UserError
from mila_mm.swap.result import Path, SwapResult
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

    Returns:
        The text.

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


def write_child(result: SwapResult, out: str | FilePath) -> None:
    """Write a swapped config to a file, and make sure that it reads back as what the swap made.

    Args:
        result: The swap.
        out: The file; an existing one is replaced.

    Raises:
        UserError: If it cannot be written.
    """
    path = FilePath(out).expanduser()
    if path.suffix != '.py':
        raise UserError(f'--out {out}: expected a name that ends in .py')
    if result.base is not None and '::' not in result.base and path.resolve() == resolve_config(result.base).resolve():
        raise UserError(f'--out {out}: is the config itself; a child needs a file of its own')
    text = child_text(result, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f'--out {out}: cannot be written: {error.strerror}') from error
    check_child(result, path)


def check_child(result: SwapResult, path: str | FilePath) -> None:
    """Read a written config and compare it with the swap's.

    Args:
        result: The swap.
        path: The file.

    Raises:
        UserError: If they differ; that happens where the original computes entries from others of its own.
    """
    try:
        read = Config.fromfile(path, import_custom_modules=False)._cfg_dict.to_dict()
    except Exception as error:
        raise UserError(f'{path} was written, but cannot be read back: {one_line(error)}') from error
    expected = result.config._cfg_dict.to_dict()
    wrong = [key for key in {*read, *expected} if read.get(key, _SAME) != expected.get(key, _SAME)]
    if wrong:
        raise UserError(f'{path} was written, but reads back with other values of {", ".join(sorted(wrong))}')


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
    return '; '.join(f'{".".join(map(str, p[len(path):]))}: {reason}' for p, reason in inner.items())


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
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise UserError(f'a changed part of the config holds a {type(value).__name__}, which cannot be written as text')


def _are_names(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and key.isidentifier() for key in value)


def _wrapped(text: str, bullet: str = '', indent: str = '') -> list[str]:
    first = f'{indent}# {bullet}'
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=f'{indent}# {" " * len(bullet)}',
                         break_on_hyphens=False, break_long_words=False) if text else []
