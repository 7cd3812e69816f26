"""Say what a swap has changed, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from mila_mm.swap.result import ABSENT, SwapResult

_LONGEST = 60


def report(result: SwapResult) -> str:
    """Describe a swap.

    Args:
        result: The swap.

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
