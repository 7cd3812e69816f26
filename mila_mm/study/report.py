"""The tables of the study as Markdown: what is computed, what was measured, and what is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mila_mm.engine.complexity import operation_counter
from mila_mm.study.model import STUDY_ROWS, LinearAttentionClassifier
from mila_mm.study.published import Published

TITLES = {
    'baseline': 'baseline: linear attention',
    'input_gate': '+ input gate',
    'forget_gate': '+ forget gate',
    'shortcut': '+ shortcut',
    'no_normalization': '- normalisation',
    'single_head': '- several heads',
    'block_all': "+ Mamba's block, all of it",
    'block_substitute': "+ Mamba's block, attention half",
    'ape': 'APE',
    'lepe': 'LePE',
    'cpe': 'CPE',
    'rope': 'RoPE',
    'lepe_cpe_rope': 'LePE + CPE + RoPE',
}

Costs = Mapping[str, tuple[int, int]]
Measured = Mapping[str, Mapping[str, float]]


def classifier(row: str) -> nn.Module:
    """Build a row of the study as it is counted: Swin-T's size with 1000 classes, in eval mode."""
    return LinearAttentionClassifier('tiny', **STUDY_ROWS[row]).eval()


def count_costs(rows: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Count parameters and multiply-adds at 224 x 224.

    Args:
        rows: Keys of :data:`mila_mm.models.STUDY_ROWS`.

    Returns:
        (parameters, multiply-adds) by row.
    """
    costs = {}
    for row in rows:
        model = classifier(row)
        with torch.no_grad():
            macs = int(operation_counter(model, torch.zeros(1, 3, 224, 224)).total())
        costs[row] = sum(p.numel() for p in model.parameters()), macs
    return costs


def ablation_table(rows: Sequence[Mapping[str, Any]], costs: Costs, measured: Measured) -> str:
    """Render one of the two ablation tables.

    Args:
        rows: Published figures with their ``row``; the first one is the baseline.
        costs: Parameters and multiply-adds by row.
        measured: What :func:`mila_mm.study.throughput.relative_throughput` returns; may lack rows.

    Returns:
        A Markdown table.
    """
    lines = [
        _header(
            'variant',
            'params',
            'published',
            'MACs',
            'published',
            'throughput here (quartiles)',
            'published',
            'published top-1',
        )
    ]
    base = rows[0]['throughput']
    for row in rows:
        params, macs = costs[row['row']]
        here = measured.get(row['row'])
        speed = '' if here is None else f'{here["ratio"]:.2f} ({here["ratio_q1"]:.2f} to {here["ratio_q3"]:.2f})'
        lines.append(
            _line(
                TITLES[row['row']],
                f'{params / 1e6:.2f} M',
                f'{row["params"]} M',
                f'{macs / 1e9:.2f} G',
                f'{row["macs"]} G',
                speed,
                f'{row["throughput"] / base:.2f}',
                f'{row["top1"]:.1f}',
            )
        )
    return '\n'.join(lines)


def mask_rcnn_table(published: Published) -> str:
    """Render the comparison of Mask R-CNN on COCO."""
    sides = ('box AP', 'AP50', 'AP75', 'mask AP', 'AP50', 'AP75')
    lines = [_header('backbone', 'params', 'MACs', *(f'1x {s}' for s in sides), *(f'3x {s}' for s in sides))]
    for row in published.tables['mask_rcnn'].rows:
        figures = [figure for key in ('one', 'three') for figure in row[key] or [None] * 6]
        lines.append(
            _line(_named(row, published), _cost(row, 'params', 'M'), _cost(row, 'macs', 'G'), *map(_cell, figures))
        )
    return '\n'.join([*lines, '', _sources(published, 'mask_rcnn')])


def upernet_table(published: Published) -> str:
    """Render the comparison of UperNet on ADE20K."""
    lines = [_header('backbone', 'params', 'MACs', 'mIoU', 'mIoU, several scales')]
    for row in published.tables['upernet'].rows:
        lines.append(
            _line(
                _named(row, published),
                _cost(row, 'params', 'M'),
                _cost(row, 'macs', 'G'),
                _cell(row['single']),
                _cell(row['multi']),
            )
        )
    return '\n'.join([*lines, '', _sources(published, 'upernet')])


def check_order(measured: Measured) -> list[str]:
    """Compare the order of the measured throughputs with the paper's.

    Args:
        measured: Ratios to the baseline by row, all of those below.

    Returns:
        One sentence for each statement of the paper's tables, that it holds here or how it does not.
    """

    def ratio(row: str) -> float:
        return measured[row]['ratio']

    def verdict(holds: bool) -> str:
        return 'holds here' if holds else '**does not hold here**'

    lines = [
        f'A forget gate makes it slower: {verdict(ratio("forget_gate") < 1)} ({ratio("forget_gate"):.2f}).',
        f'A single head makes it faster: {verdict(ratio("single_head") > 1)} ({ratio("single_head"):.2f}).',
    ]
    for row in ('ape', 'lepe', 'cpe', 'rope'):
        holds = abs(ratio(row) - 1) <= 0.1
        lines.append(f'{TITLES[row]} is within 10 % of the baseline: {verdict(holds)} ({ratio(row):.2f}).')
    return lines


def _named(row: Mapping[str, Any], published: Published) -> str:
    """Name of a row; what does not come from the paper has a mark that :func:`_sources` explains."""
    name = f'**{row["model"]}**' if row['family'] == 'MILA' else row['model']
    return name if row['source'] == 'paper' else f'{name} [{list(published.sources).index(row["source"])}]'


def _sources(published: Published, table: str) -> str:
    """Say where the figures of a table come from."""
    sources = published.tables[table].sources
    text = f'All figures are published ones. Source: {published.sources["paper"]}'
    others = [f'[{list(published.sources).index(s)}] {published.sources[s]}' for s in sources if s != 'paper']
    return '; '.join([text, *others]) + '.'


def _cost(row: Mapping[str, Any], key: str, unit: str) -> str:
    return '' if row[key] is None else f'{row[key]} {unit}'


def _cell(figure: float | None) -> str:
    return '' if figure is None else f'{figure:.1f}'


def _line(*cells: str) -> str:
    return f'| {" | ".join(cells)} |'


def _header(*cells: str) -> str:
    return f'{_line(*cells)}\n{_line(*["---"] * len(cells))}'
