"""Published figures with their sources, as ``benchmarks/published.yml`` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mila_mm.errors import UserError


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        rows: Each a mapping of column to figure, None where nothing is published, and of ``source`` to the key of
            the row's source.
    """

    rows: tuple[Mapping[str, Any], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of the sources, in the order in which rows first name them."""
        return tuple(dict.fromkeys(row['source'] for row in self.rows))


@dataclass(frozen=True)
class Published:
    """All tables, and what the keys of their sources stand for."""

    tables: Mapping[str, Table]
    sources: Mapping[str, str]


def read_published(path: str | Path) -> Published:
    """Read and check a file of published figures.

    Args:
        path: A YAML file: ``sources``, and tables with a ``source`` and ``rows``. Rows are mappings by key, or lists
            in the order of the table's ``columns``, or such a list under ``row`` beside a ``source`` of its own.

    Returns:
        The figures.

    Raises:
        UserError: If the file is missing, a row has not as many figures as columns, or a source is not explained.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: expected a file of published figures, found none')
    document = yaml.safe_load(path.read_text(encoding='utf-8'))
    sources = document.pop('sources')
    tables = {name: Table(tuple(_rows(f'{path}: {name}', table))) for name, table in document.items()}
    unknown = {row['source'] for table in tables.values() for row in table.rows} - set(sources)
    if unknown:
        raise UserError(f'{path}: expected every source under sources, not found: {", ".join(sorted(unknown))}')
    return Published(tables, sources)


def _rows(where: str, table: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(table['rows'], dict):
        return [{'row': key, 'source': table['source'], **row} for key, row in table['rows'].items()]
    result = []
    for entry in table['rows']:
        values, source = (entry['row'], entry['source']) if isinstance(entry, dict) else (entry, table['source'])
        if len(values) != len(table['columns']):
            raise UserError(f'{where}: expected {len(table["columns"])} figures in a row, got {values}')
        result.append({'source': source, **dict(zip(table['columns'], map(_figure, values), strict=True))})
    return result


def _figure(value: Any) -> Any:
    """Turn '-' into None, also inside of a list."""
    if isinstance(value, list):
        return [_figure(v) for v in value]
    return None if value == '-' else value
