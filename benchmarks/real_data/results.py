"""The JSON with one row a run, which several processes may add to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks import measure
from benchmarks.real_data.tasks import KEY, Row, rates


class Results:
    """Rows in a file, read anew each time.

    Args:
        path: The JSON; made by the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows that are done."""
        return json.loads(self.path.read_text(encoding='utf-8'))['rows'] if self.path.exists() else []

    def has(self, row: Row) -> bool:
        """Whether a row is done."""
        return any(all(done[key] == row[key] for key in KEY) for done in self.rows())

    def add(self, row: Row) -> None:
        """Take a row in and write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{self.path}.lock'):
            measure.write(self.path, {'benchmark': 'real_data', 'rows': [*self.rows(), row]})

    def with_rate(self, row: Row) -> Row | None:
        """The row with its learning rate; None where the tries are not all done, or all diverged."""
        if row['lr'] is not None:
            return row
        rate = best_rate(self.rows(), row)
        return None if rate is None else {**row, 'lr': rate}


def best_rate(rows: list[Row], row: Row, most: int | None = None) -> float | None:
    """The learning rate whose try ended with the lowest training loss, once all were tried."""
    tries = [each for each in tries_of(rows, row, most) if each['loss_at_end'] is not None]
    return min(tries, key=lambda each: each['loss_at_end'])['lr'] if tries else None


def tries_of(rows: list[Row], row: Row, most: int | None = None) -> list[Row]:
    """The longest tries of a row's set and backbone for which there are all rates, of at most so many steps."""
    same = ('size', 'set', 'backbone', 'quick')
    tries = [each for each in rows if each['schedule'] == 'try' and all(each[key] == row[key] for key in same)]
    for steps in sorted({each['steps'] for each in tries}, reverse=True):
        equal = [each for each in tries if each['steps'] == steps]
        if (most is None or steps <= most) and {each['lr'] for each in equal} == set(rates(row['quick'])):
            return equal
    return []


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a run's folder while it trains; gives False where another process has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f'{folder}.lock', timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
