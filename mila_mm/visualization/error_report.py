"""Figures and one HTML page of what a test came to."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 110
# More rows than this are left out of a matrix and of curves, the least frequent first.
_MOST = 30


def save_confusion(matrix: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix, each row as shares of the truth.

    Args:
        matrix: (N, N) counts, rows the truth, columns the prediction.
        names: N names.
        path: PNG to write.
        title: Line above.
    """
    kept = np.sort(np.argsort(-(matrix.sum(0) + matrix.sum(1)), kind='stable')[:_MOST])
    matrix, names = matrix[np.ix_(kept, kept)], [names[i] for i in kept]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 2.5 + 0.36 * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = 'white' if share > 0.55 else 'black'
            axes.text(column, row, f'{100 * share:.0f}', ha='center', va='center', fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel('prediction')
    axes.set_ylabel('truth')
    axes.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.7, label='share of the truth')
    figure.savefig(path)


def save_curves(curves: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Draw precision over recall.

    Args:
        curves: Name to precisions at recalls spaced evenly from 0 to 1.
        path: PNG to write.
        title: Line above.
    """
    figure = Figure(figsize=(7.5, 5), dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    chosen = sorted(curves.items(), key=lambda item: -float(item[1].mean()))[:_MOST]
    for name, precision in chosen:
        axes.plot(np.linspace(0, 1, len(precision)), precision, linewidth=1, alpha=0.8, label=name)
    if curves:
        mean = np.mean(list(curves.values()), axis=0)
        axes.plot(np.linspace(0, 1, len(mean)), mean, color='black', linewidth=2.5, label='mean')
        axes.legend(fontsize=7, ncols=1 + len(chosen) // 16, loc='center left', bbox_to_anchor=(1.01, 0.5))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision')
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def save_bars(groups: Mapping[str, Mapping[str, int]], kinds: Sequence[str], path: Path, title: str) -> None:
    """Draw numbers of errors by kind, a bar for each group.

    Args:
        groups: Group to kind to number.
        kinds: Kinds, in order.
        path: PNG to write.
        title: Line above.
    """
    figure = Figure(figsize=(7.5, 3.6), dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / max(len(groups), 1)
    for index, (group, numbers) in enumerate(groups.items()):
        places = np.arange(len(kinds)) + (index - (len(groups) - 1) / 2) * width
        bars = axes.bar(places, [numbers.get(kind, 0) for kind in kinds], width, label=group)
        axes.bar_label(bars, fontsize=7)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=9)
    axes.set_ylabel('errors')
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path)


def write_page(
    path: Path,
    title: str,
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
    pictures: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML page that shows tables and the pictures beside it.

    Args:
        path: The page.
        title: Its heading.
        tables: Heading to row to column to number.
        pictures: File names relative to the page, with captions.
        notes: Lines below the heading.
    """
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em}'
        'table{border-collapse:collapse;margin:1em 0}'
        'td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}'
        'td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}figure{margin:1.5em 0}</style>',
        f'<h1>{html.escape(title)}</h1>',
        *(f'<p>{html.escape(line)}</p>' for line in notes),
    ]
    for heading, rows in tables.items():
        columns = list(next(iter(rows.values()), {}))
        parts.append(f'<h2>{html.escape(heading)}</h2><table><tr><th></th>')
        parts += [f'<th>{html.escape(column)}</th>' for column in columns]
        for name, row in rows.items():
            cells = ''.join(f'<td>{_cell(row.get(column))}</td>' for column in columns)
            parts.append(f'</tr><tr><td>{html.escape(name)}</td>{cells}')
        parts.append('</tr></table>')
    for name, caption in pictures:
        parts.append(
            f'<figure><img src="{html.escape(name, quote=True)}" alt=""><figcaption>{html.escape(caption)}</figcaption>'
            '</figure>'
        )
    path.write_text('\n'.join(parts) + '\n', encoding='utf-8')


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ''
    return str(value) if isinstance(value, int) else f'{value:.3f}'
