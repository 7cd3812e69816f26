"""Exponents, tables and the plot of benchmarks/high_resolution.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure

COLOURS = {'MILA-T': '#c8502d', 'Swin-T': '#2a7fb8', 'ConvNeXt-T': '#5a9a3c', 'ViT-S': '#777777'}
TITLES = {'forward': 'inference', 'step': 'forward and backward', 'attention': 'attention by itself'}
SIDES = (512, 1024, 1536, 2048, 3072, 4096)
"""Pixels a side that are run, unless others are asked for."""
FIT_FROM = 1024
"""Sides from which on exponents are fitted: below, fixed costs and caches still show."""
Row = dict[str, Any]


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The exponent of time in pixels by least squares on log axes, and half the width of its 95 % interval.

    Args:
        points: Sides in pixels with seconds, at least two.

    Returns:
        The exponent, and infinity beside it where two points leave nothing to judge it by.
    """
    from scipy import stats

    fit = stats.linregress([2 * math.log(side) for side, _ in points], [math.log(seconds) for _, seconds in points])
    freedom = len(points) - 2
    return float(fit.slope), float(stats.t.ppf(0.975, freedom) * fit.stderr) if freedom else math.inf


def points_of(rows: Sequence[Row], what: str, name: str, key: str = 'seconds') -> list[tuple[int, float]]:
    """Sides and figures of a model, by side."""
    same = [row for row in rows if row['stage'] == what and row['implementation'] == name and row.get(key)]
    return sorted((row['image'][0], row[key]) for row in same)


def exponents(rows: Sequence[Row]) -> str:
    """The table of exponents."""
    lines = ['| | ' + ' | '.join(TITLES.values()) + ' |', '| --- ' * (1 + len(TITLES)) + '|']
    for name in COLOURS:
        cells = []
        for what in TITLES:
            points = [point for point in points_of(rows, what, name) if point[0] >= FIT_FROM]
            if len(points) < 2:
                cells.append('' if what == 'attention' and name not in ('MILA-T', 'ViT-S') else 'not run')
                continue
            exponent, half = fitted(points)
            interval = (
                'two points, no interval' if half == math.inf else f'{exponent - half:.2f} to {exponent + half:.2f}'
            )
            cells.append(f'{exponent:.2f} ({interval}; {points[0][0]} to {points[-1][0]})')
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def cell(row: Row | None) -> str:
    """A figure of the table: seconds and GiB, or why there is none."""
    if row is None:
        return 'not run'
    if 'left_out' in row:
        return 'left out'
    if 'computed_bytes' in row:
        return f'{row["computed_bytes"] / 2**30:.2f} GiB'
    return f'{row["seconds"]:.2f} s, {row["peak_bytes"] / 2**30:.2f} GiB'


def table(rows: Sequence[Row], what: str) -> str:
    """The table of one kind of figure."""
    names = [name for name in COLOURS if any(r['stage'] == what and r['implementation'] == name for r in rows)]
    lines = ['| side | ' + ' | '.join(names) + ' |', '| --- ' * (1 + len(names)) + '|']
    for side in sorted({*SIDES, *(row['image'][0] for row in rows if row['stage'] == what)}):
        found = {r['implementation']: r for r in rows if r['stage'] == what and r['image'][0] == side}
        lines.append(f'| {side} | ' + ' | '.join(cell(found.get(name)) for name in names) + ' |')
    return '\n'.join(lines)


def page(rows: Sequence[Row]) -> str:
    """All tables as Markdown."""
    machine, measured = rows[-1]['machine'], [row for row in rows if 'seconds' in row]
    days = sorted({row['machine']['date'][:10] for row in rows})
    loads = [row['load'] for row in measured if 'load' in row]
    where = f'{machine.get("gpu", machine.get("cpu"))}, torch {machine["torch"]}, {" to ".join(dict.fromkeys(days))}'
    if loads:
        where += (
            f'; {machine["threads"]} thread, fp32, seconds of CPU time while other work made the load of the '
            f'machine {min(loads):.0f} to {max(loads):.0f}'
        )
    parts = [f'{where}.', f'Exponents of the time in pixels, from {FIT_FROM} pixels a side on, with 95 % intervals:']
    parts.append(exponents(rows))
    for what, title in TITLES.items():
        if any(row['stage'] == what for row in rows):
            parts += [f'{title.capitalize()} of one image, time and peak memory:', table(rows, what)]
    if any(row['stage'] == 'memory' for row in rows):
        parts += ['Peak of forward and backward of one image in fp32, computed:', table(rows, 'memory')]
    reasons = sorted({f'- {TITLES[r["stage"]]}, {r["implementation"]}, {r["image"][0]}: {r["left_out"]}'
                      for r in rows if 'left_out' in r})  # fmt: skip
    return '\n\n'.join([*parts, *(['Left out:', '\n'.join(reasons)] if reasons else [])])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw times and memory on log axes, with the exponents."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.5))
    panels = [(what, 'seconds', f'{title}, s') for what, title in TITLES.items()]
    panels.append(('memory', 'computed_bytes', 'computed peak of forward and backward, GiB'))
    for axis, (what, key, title) in zip(axes.flat, panels, strict=True):
        for name, colour in COLOURS.items():
            points = points_of(rows, what, name, key)
            if not points:
                continue
            large = [point for point in points if point[0] >= FIT_FROM]
            label = f'{name}: pixels^{fitted(large)[0]:.2f}' if len(large) > 1 else name
            unit = 2**30 if key == 'computed_bytes' else 1
            axis.plot([x for x, _ in points], [y / unit for _, y in points], 'o-', color=colour, label=label, ms=4)
        axis.set(xscale='log', yscale='log', title=title, xlabel='pixels a side')
        axis.set_xticks(SIDES, [str(side) for side in SIDES])
        axis.minorticks_off()
        axis.tick_params(axis='x', labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f'wrote {path}')


def write_page(rows: Sequence[Row], docs: Path | None) -> None:
    """Print the tables, or write them into docs/high_resolution.md and draw the plot beside it."""
    if docs is None:
        print(page(rows))
        return
    gpu = 'gpu' in rows[-1]['machine']
    measure.write_docs(
        page(rows), 'benchmarks/high_resolution.py' + (' on a GPU' if gpu else ''), docs / 'high_resolution.md'
    )
    plot(rows, docs / 'images' / ('high_resolution_gpu.png' if gpu else 'high_resolution.png'))
