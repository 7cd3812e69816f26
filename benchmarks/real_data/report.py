"""Tables, a verdict and plots of the rows, for docs/real_data.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.real_data.backbones import LABELS, NAMES
from benchmarks.real_data.results import best_rate, tries_of
from benchmarks.real_data.tasks import LONG, RATES, SHORT, TASKS, Row, Task

COLOURS = {'MILA': '#c8502d', 'ResNet': '#777777', 'Swin': '#2a7fb8', 'ConvNeXt': '#5a9a3c'}
# Key of a figure, its heading and decimals
FIGURES = {
    'boxes': [('coco/bbox_mAP', 'AP', 3), ('coco/bbox_mAP_50', 'AP50', 3)],
    'masks': [('coco/segm_mAP', 'mask AP', 3), ('coco/segm_mAP_50', 'mask AP50', 3)],
    'labels': [('mIoU', 'mIoU', 1), ('mAcc', 'mean accuracy', 1), ('aAcc', 'pixel accuracy', 1)],
}
NOT_RUN = 'not run'
LEVEL = {True: 0.03, False: 2.0}
"""Difference below which two runs are called level, of a detector (AP50) and of a segmentor (mIoU in percent)."""


def figures_of(task: Task) -> list[tuple[str, str, int]]:
    """The figures of a set."""
    if not task.detects:
        return FIGURES['labels']
    return FIGURES['boxes'] + (FIGURES['masks'] if task.has_masks else [])


def lengths(rows: Sequence[Row], size: str, name: str, schedule: str) -> list[int]:
    """Numbers of steps for which there are runs, the longest first."""
    same = {'size': size, 'set': name, 'schedule': schedule, 'quick': False}
    return sorted({row['steps'] for row in rows if all(row[k] == v for k, v in same.items())}, reverse=True)


def runs(rows: Sequence[Row], size: str, name: str, schedule: str, steps: int) -> dict[str, list[Row]]:
    """Runs of one schedule by backbone, with the learning rate that was chosen, a seed each.

    A short run is judged by the tries that belong to it, a tenth as long: longer ones may have come since.
    """
    found: dict[str, list[Row]] = {}
    wanted = {'size': size, 'set': name, 'schedule': schedule, 'steps': steps, 'quick': False}
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()) and (
            schedule == LONG or row['lr'] == best_rate(list(rows), row, steps // 10)
        ):
            found.setdefault(row['backbone'], []).append(row)
    return found


def spread(values: Sequence[float | None], digits: int) -> str:
    """A figure, or the mean of several with the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return 'none'
    if len(known) == 1:
        return f'{known[0]:.{digits}f}'
    return f'{statistics.mean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})'


def where(rows: Sequence[Row]) -> str:
    """Machine, versions and dates of rows, in a sentence."""
    machine = rows[-1]['machine']
    days = sorted({row['machine']['date'][:10] for row in rows})
    loads = [row['machine']['load'] for row in rows]
    return (
        f'{machine.get("gpu", machine.get("cpu"))}, {machine["threads"]} thread, torch {machine["torch"]}, '
        f'{" to ".join(dict.fromkeys((days[0], days[-1])))}; other work on the machine made its load '
        f'{min(loads):.0f} to {max(loads):.0f}.'
    )


def comparison(rows: Sequence[Row], size: str, name: str, steps: int) -> str:
    """The table of a set: every backbone in one schedule."""
    task = TASKS[size][name]
    found = runs(rows, size, name, SHORT, steps)
    figures = figures_of(task)
    # Under a GPU the host's time says nothing.
    time_key, time_name = ('step_wall_s', 'ms') if size == 'tiny' else ('step_cpu_s', 'CPU ms')
    heads = ['backbone', 'seeds', 'learning rate', 'G MACs', 'M parameters', *(f[1] for f in figures)]
    lines = [
        '| ' + ' | '.join([*heads, f'{time_name} a step', 'peak MiB']) + ' |',
        '| --- ' * (len(heads) + 2) + '|',
    ]
    base = found['MILA'][0]['macs'] if 'MILA' in found else None
    for backbone in NAMES:
        group = [row for row in found.get(backbone, []) if row['final'] is not None]
        label = LABELS[size][backbone]
        if not group:
            lines.append(f'| {label} ' + f'| {NOT_RUN} ' * (len(heads) + 1) + '|')
            continue
        ratio = f' ({group[0]["macs"] / base - 1:+.1%})' if base and backbone != 'MILA' else ''
        cells = [label, str(len(group)), f'{group[0]["lr"]:g}', f'{group[0]["macs"] / 1e9:.2f}{ratio}']
        cells.append(f'{group[0]["params"] / 1e6:.2f}')
        cells += [spread([row['final'].get(key) for row in group], digits) for key, _, digits in figures]
        cells.append(f'{1e3 * statistics.median(row[time_key] for row in group):.0f}')
        cells.append(f'{statistics.median(row["peak_bytes"] for row in group) / 2**20:.0f}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    some = [row for group in found.values() for row in group]
    batch = some[0]['images'] // some[0]['steps']
    absent = len(task.seeds) * len(NAMES) - len([row for row in some if row['seed'] in task.seeds])
    lines += ['', f'{steps} steps of {batch} images. {where(some)}' + same_images(some)]
    if absent:
        planned = f'{len(NAMES)} backbones with seed{"s" * (len(task.seeds) > 1)} {", ".join(map(str, task.seeds))}'
        lines[-1] += f' **{absent} of the {len(task.seeds) * len(NAMES)} planned runs ({planned}) have not run.**'
    return '\n'.join(lines)


def same_images(rows: Sequence[Row]) -> str:
    """Whether the checksums of what rows with one seed have seen agree."""
    by_seed: dict[int, set[int]] = {}
    for row in rows:
        by_seed.setdefault(row['seed'], set()).add(row['data_digest'])
    if any(len(digests) > 1 for digests in by_seed.values()):
        return ' **The checksums of the training images differ: these rows cannot be compared.**'
    return ' Training images and their augmentation: equal by checksum.'


def verdict(rows: Sequence[Row], size: str, name: str, steps: int) -> str:
    """One sentence: whom MILA is ahead of, level with and behind."""
    task = TASKS[size][name]
    found = {key: [r for r in group if r['final']] for key, group in runs(rows, size, name, SHORT, steps).items()}
    heading = next(head for key, head, _ in figures_of(task) if key == task.metric)
    means = {key: statistics.mean(row['final'][task.metric] for row in group) for key, group in found.items() if group}
    if 'MILA' not in means or len(means) == 1:
        return f'- {name}: not enough runs to compare.'
    said: dict[str, list[str]] = {'ahead of': [], 'level with': [], 'behind': []}
    for backbone, value in means.items():
        if backbone != 'MILA':
            difference = means['MILA'] - value
            word = 'level with' if abs(difference) < LEVEL[task.detects] else 'ahead of' if difference > 0 else 'behind'
            said[word].append(f'{backbone} ({difference:+.{3 if task.detects else 1}f})')
    parts = [f'{word} {", ".join(names)}' for word, names in said.items() if names]
    absent = [backbone for backbone in NAMES if backbone not in means]
    return f'- {name}, {heading}: MILA is {"; ".join(parts)}.' + (f' Not run: {", ".join(absent)}.' if absent else '')


def long_runs(rows: Sequence[Row], size: str) -> str:
    """The table of MILA alone in its long schedule against the goals."""
    lines = ['| set | steps | images | figure | goal | minutes of CPU | seed |', '| --- ' * 7 + '|']
    for name, task in TASKS[size].items():
        heading = next(head for key, head, _ in figures_of(task) if key == task.metric)
        digits = 3 if task.detects else 1
        steps = lengths(rows, size, name, LONG)
        done = [row for count in steps for row in runs(rows, size, name, LONG, count).get('MILA', []) if row['final']]
        if not done:
            lines.append(f'| {name} | {NOT_RUN} | | {heading} {NOT_RUN} | {task.goal} | | |')
        for row in done:
            figure = f'{heading} {row["final"][task.metric]:.{digits}f}'
            minutes = row['cpu_seconds'] / 60
            cells = [name, row['steps'], row['images'], figure, task.goal, f'{minutes:.1f}', row['seed']]
            lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def classes(rows: Sequence[Row], size: str, schedule: str) -> str:
    """IoU of each class of CamVid beside its share of the held-out pixels, of the runs of a schedule with one seed."""
    columns: dict[str, Row] = {}
    for steps in lengths(rows, size, 'camvid', schedule)[:1]:
        for backbone, group in runs(rows, size, 'camvid', schedule, steps).items():
            if group[0]['final']:
                columns[f'{LABELS[size][backbone]}, {steps} steps'] = group[0]
    if not columns:
        return f'{NOT_RUN.capitalize()}.'
    first = next(iter(columns.values()))['final']
    names = [key.removeprefix('share.') for key in first if key.startswith('share.')]
    lines = ['| class | share of pixels, % | ' + ' | '.join(columns) + ' |', '| --- ' * (len(columns) + 2) + '|']
    for name in sorted(names, key=lambda each: -first[f'share.{each}']):
        cells = [spread([row['final'][f'IoU.{name}']], 1) for row in columns.values()]
        lines.append(f'| {name} | {first[f"share.{name}"]:.1f} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def tries(rows: Sequence[Row], size: str) -> str:
    """The table of learning rates."""
    lines = ['| set | backbone | steps | ' + ' | '.join(f'{rate:g}' for rate in RATES) + ' |']
    lines.append('| --- ' * (3 + len(RATES)) + '|')
    for name in TASKS[size]:
        for backbone in NAMES:
            wanted = {'size': size, 'set': name, 'backbone': backbone, 'quick': False}
            found = {row['lr']: row for row in tries_of(list(rows), wanted)}
            best = best_rate(list(rows), wanted)
            if not found:
                lines.append(f'| {name} | {LABELS[size][backbone]} ' + f'| {NOT_RUN} ' * (1 + len(RATES)) + '|')
                continue
            cells = []
            for rate in RATES:
                loss = found[rate]['loss_at_end']
                text = 'diverged' if loss is None else f'{loss:.3f}'
                cells.append(f'**{text}**' if rate == best else text)
            steps = found[RATES[0]]['steps']
            lines.append(f'| {name} | {LABELS[size][backbone]} | {steps} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def tables(rows: Sequence[Row], size: str) -> str:
    """All of it as Markdown, in sections."""
    parts, verdicts = [], []
    for name, task in TASKS[size].items():
        parts.append(f'### {name}: {task.model}')
        counts = lengths(rows, size, name, SHORT)
        parts += [comparison(rows, size, name, steps) for steps in counts[:1]] or [f'{NOT_RUN.capitalize()}.']
        verdicts += [verdict(rows, size, name, steps) for steps in counts[:1]]
    parts += ['### Where MILA stands', '\n'.join(verdicts) or f'{NOT_RUN.capitalize()}.']
    parts += ['### MILA in the long schedule', long_runs(rows, size)]
    parts += ['### Classes of CamVid', 'IoU in percent; all backbones:', classes(rows, size, SHORT)]
    parts += ['MILA alone, longer:', classes(rows, size, LONG)]
    parts += ['### Learning rates', 'Training loss over the last quarter of the tries; the chosen one is bold.']
    parts.append(tries(rows, size))
    return '\n\n'.join(parts)


def write_pages(rows: Sequence[Row], docs: Path, size: str) -> None:
    """Write the tables into docs/real_data.md and draw the curves beside it."""
    name = 'benchmarks/real_data' + (' on a GPU' if size == 'tiny' else '')
    measure.write_docs(tables(rows, size), name, docs / 'real_data.md')
    plot(rows, size, docs / 'images' / ('real_data_gpu.png' if size == 'tiny' else 'real_data.png'))


def plot(rows: Sequence[Row], size: str, path: Path) -> None:
    """Draw the held-out figure against the images seen: above all backbones, below MILA alone in its long schedule."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    tasks, both = TASKS[size], (SHORT, LONG)
    figure, axes = pyplot.subplots(len(both), len(tasks), figsize=(4.6 * len(tasks), 7.4))
    for line, schedule in zip(axes, both, strict=True):
        for axis, (name, task) in zip(line, tasks.items(), strict=True):
            for steps in lengths(rows, size, name, schedule)[:1]:
                for backbone, group in runs(rows, size, name, schedule, steps).items():
                    draw_curves(axis, task, group, LABELS[size][backbone], COLOURS[backbone])
            heading = next(head for key, head, _ in figures_of(task) if key == task.metric)
            what = 'all backbones' if schedule == SHORT else 'MILA alone, longer'
            axis.set(title=f'{name}, {task.model}: {what}', xlabel='images seen')
            axis.set_ylabel(f'{heading} on part of the held-out images')
            axis.grid(alpha=0.3)
            if schedule == LONG:
                axis.axhline(task.goal, color='#999999', ls=':', label='goal, on all held-out images')
            if axis.lines:
                axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f'wrote {path}')


def draw_curves(axis: Any, task: Task, group: Sequence[Row], label: str, colour: str) -> None:
    """Draw the curves of one backbone, one for each seed."""
    for row in group:
        images = [0, *(point['images'] for point in row['curve'])]
        values = [0.0, *(point.get(task.metric, 0.0) for point in row['curve'])]
        axis.plot(images, values, 'o-', color=colour, label=label if row is group[0] else None, ms=3, lw=1.6)
