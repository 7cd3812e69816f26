"""The table and the conclusions of the small replication, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mila_mm.errors import UserError
from mila_mm.study.replication import Row, noise, rank_correlation, summarise, verdict

_BASELINE = 'baseline'
# Top-1 on ImageNet-1K at 224 of each row at Swin-T's size: arXiv 2405.16605, tables of the ablations. The last row is
# MILA's choice of encodings on the plain layout, for which the paper has no figure.
PUBLISHED: Mapping[str, float | None] = {
    'baseline': 77.6,
    'input_gate': 77.8,
    'forget_gate': 78.4,
    'shortcut': 77.8,
    'no_normalization': 72.4,
    'single_head': 73.5,
    'block_all': 79.4,
    'block_substitute': 80.9,
    'ape': 80.0,
    'lepe': 81.6,
    'cpe': 81.7,
    'rope': 80.0,
    'lepe_cpe_rope': None,
}


def check_rows(wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the rows to train.

    Args:
        wanted: Names, None for all.
        known: Names of all rows.

    Returns:
        The names in the order of ``known``.

    Raises:
        UserError: If one is unknown.
    """
    known = list(known)
    unknown = [row for row in wanted or () if row not in known]
    if unknown:
        raise UserError(f'--rows: there is no row {unknown[0]!r}; rows are {", ".join(known)}')
    return [row for row in known if wanted is None or row in wanted]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Write the table of a replication and what it shows.

    Args:
        results: What :func:`mila_mm.study.replication.run_row` returned, of some or all rows.

    Raises:
        UserError: If the baseline has not been run: there is nothing to compare with.
    """
    rows = summarise(results, PUBLISHED)
    baseline = next((row for row in rows if row.name == _BASELINE), None)
    if baseline is None:
        raise UserError(f'the row {_BASELINE} has not been trained: there is nothing to compare the others with')
    margin = noise(rows)
    return '\n'.join(
        [*_head(results, rows, margin), *_table(rows, baseline, margin), '', *_conclusions(rows, baseline, margin), '']
    )


def _head(results: Sequence[Mapping[str, Any]], rows: Sequence[Row], margin: float | None) -> list[str]:
    machines = sorted(
        {
            '{device}, torch {torch}, mmengine {mmengine}, mmseg {mmseg}, mila_mm {mila_mm}'.format(**r['machine'])
            for r in results
        }
    )
    dates = sorted({r['machine']['date'] for r in results})
    seeds = sorted({r['seed'] for r in results})
    budgets = sorted({f'{r["iterations"]} steps of {r["batch_size"]} images' for r in results})
    data = sorted(
        {'{num_train} training images, {num_val} held out, {size} x {size} pixels'.format(**r['data']) for r in results}
    )
    freedom = len(results) - len(rows)
    open_runs = len(rows) * len(seeds) - len(results)
    waiting = f'; {open_runs} of that command have not run yet' if open_runs else ''
    scatter = (
        f'Two rows closer than {margin:.2f} points cannot be told apart: two standard errors of a difference, from the '
        f'scatter of seeds pooled over the rows ({freedom} run{"s" * (freedom > 1)} beyond the first of a row; '
        'with few, a rough guess).'
        if margin is not None
        else 'One seed: nothing here says how far seeds scatter, so small differences mean nothing.'
    )
    return [
        '# The study, replicated in small',
        '',
        'Every row of the study (arXiv 2405.16605, sections 4 and 5) at nano width (32, 64, 128, 256; depths 1 1 2 1),',
        'trained on the shapes set: semantic segmentation of 7 classes. All rows have the same data, head, schedule',
        'and number of steps, and start from random weights. The head has 1x1 convolutions and resizing only, so',
        'whatever tells a pixel of its surroundings is in the backbone.',
        '',
        'The paper trained models twenty times larger on ImageNet-1K, 300 epochs each. What agrees here agrees in',
        "spite of that; what does not agree refutes nothing. Top-1 is the paper's, *published*; mIoU is ours.",
        '',
        f'- Written by `python tools/analysis_tools/replicate_study.py --seeds {" ".join(map(str, seeds))}`: '
        f'{len(results)} runs of {len(rows)} rows{waiting}.',
        f'- Data: {"; ".join(data)}. Budget of each run: {"; ".join(budgets)}.',
        *(f'- {machine}.' for machine in machines),
        f'- {" to ".join(dict.fromkeys((dates[0], dates[-1])))}. {scatter}',
        '',
    ]


def _table(rows: Sequence[Row], baseline: Row, margin: float | None) -> list[str]:
    lines = [
        '| row | params of the backbone | mIoU, each seed | mean | against the baseline | published top-1 | '
        'against the baseline, published | direction |',
        '| --- ' * 8 + '|',
    ]
    for row in rows:
        ours = '' if row is baseline else f'{row.mean - baseline.mean:+.2f}'
        theirs = '' if row.published is None or row is baseline else f'{row.published - baseline.published:+.1f}'
        top1 = '' if row.published is None else f'{row.published:.1f}'
        lines.append(
            f'| {row.name} | {row.params / 1e6:.2f} M | {" ".join(f"{v:.2f}" for v in row.values)} | '
            f'{row.mean:.2f} | {ours} | {top1} | {theirs} | {verdict(row, baseline, margin)} |'
        )
    return lines


def _conclusions(rows: Sequence[Row], baseline: Row, margin: float | None) -> list[str]:
    groups: dict[str, list[str]] = {'as in the paper': [], 'the other way': [], 'within the noise': []}
    for row in rows:
        outcome = verdict(row, baseline, margin)
        if outcome:
            groups[outcome].append(row.name)
    compared = sum(map(len, groups.values()))
    lines = ["## Where the paper's order shows, and where not", '']
    if not compared:
        return [*lines, 'No row to compare with the baseline has been trained.']
    names = {key: ', '.join(value) or 'none' for key, value in groups.items()}
    lines += [
        f'- Moved from the baseline in the direction of the paper: {len(groups["as in the paper"])} of {compared} '
        f'({names["as in the paper"]}).',
        f'- Moved the other way: {len(groups["the other way"])} ({names["the other way"]}).',
    ]
    if margin is not None:
        lines.append(
            f'- Cannot be told from the baseline: {len(groups["within the noise"])} ({names["within the noise"]}).'
        )
    collapsed = [row for row in rows if row.mean < baseline.mean / 2]
    without = ''
    if collapsed:
        broken = ', '.join(row.name for row in collapsed)
        lines.append(
            f'- Did not learn, with less than half of the mIoU of the baseline: {broken}. '
            'That is more than the loss of accuracy which the paper reports.'
        )
        kept = [row for row in rows if row not in collapsed]
        without = f'; {rank_correlation(kept):+.2f} without {broken}'
    ours = sorted((row for row in rows if row.published is not None), key=lambda row: -row.mean)
    theirs = sorted(ours, key=lambda row: -row.published)
    lines += [
        f'- Rank correlation (Spearman) of our mIoU with the published top-1 over {len(ours)} rows: '
        f'{rank_correlation(rows):+.2f}{without}.',
        f'- Our order: {", ".join(row.name for row in ours)}.',
        f"- The paper's: {', '.join(row.name for row in theirs)}.",
    ]
    return lines
