"""The table and the plot of a benchmark's JSON, and which of the goals for speed it meets.

python -m benchmarks.report benchmarks/results/attention_op.json [--dtype bf16] [--plot out.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
IMPLEMENTATIONS = (
    *('eager', 'compiled', 'ours', 'ours-fused', 'ours-modules', 'ours-compiled', 'ours-graphs'),
    *('resnet50', 'swin-t', 'convnext-t'),
)
PASSES = (('forward', 'forward'), ('both', 'forward + backward'))
# The goals, all in bf16 at 800 x 1280. From batch 4 on: how many times faster than eager all attentions of MILA-T are
# together (its blocks by stage). At batch 2: how many times faster than others a training step of MILA-T is, and the
# share of their peak memory.
CORE_GOALS, DEPTHS = {'forward': 8.0, 'both': 6.0}, {1: 2, 2: 4, 3: 8, 4: 4}
STEP_GOALS, PEAK_GOAL = {'eager': 2.5, 'compiled': 1.3}, 0.5
# Of the same step, milliseconds of the device; beside ConvNeXt-T, whose figures on an H200 are 6.3 and 19.7, the share
# of its wall clock and of its peak memory; with CUDA graphs, the wall clock over the device's own time.
DEVICE_GOALS, WALL_GOAL, GRAPHS_GOAL = {'forward': 3.0, 'both': 9.0}, 1.5, 1.1
COPY_GOAL, COPY_BATCH = 60.0, 8
"""Percent of the copy bandwidth that the stencils and the attention reach in stages 1 to 3, from this batch on."""


def grouped(rows: list[Row]) -> dict[tuple[object, ...], dict[str, Row]]:
    """Implementation to row, for each dtype, stage (or arch) and size."""
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        height, width = row['image']
        key = row['dtype'], row.get('stage', row.get('arch')), f'{height} x {width}', row['batch']
        groups.setdefault(key, {})[row['implementation']] = row
    return groups


def cell(row: Row | None, key: str) -> str:
    """Median time in milliseconds, or why there is none."""
    if row is None:
        return ''
    if not row['correct']:
        return 'wrong'
    return f'{row[key]["median"]:.3f}' if key in row else 'out of memory'


def ratio(rows: dict[str, Row], other: str, key: str) -> str:
    """How many times faster ours is than ``other``."""
    if not all(name in rows and key in rows[name] for name in ('ours', other)):
        return ''
    return f'{rows[other][key]["median"] / rows["ours"][key]["median"]:.1f} x'


def table(document: dict[str, Any], dtype: str | None) -> str:
    """The result as a Markdown table."""
    machine = document['machine']
    lines = [
        f'{machine["gpu"]}, driver {machine["driver"]}, torch {machine["torch"]}, triton {machine["triton"]}, '
        f'commit {machine["commit"][:12]}, {machine["date"][:10]}'
    ]
    if 'copy_bandwidth' in document:
        lines[0] += f'; copy bandwidth {document["copy_bandwidth"] / 1e12:.2f} TB/s'
    names = [name for name in IMPLEMENTATIONS if any(row['implementation'] == name for row in document['rows'])]
    columns = [
        'dtype',
        'stage',
        'image',
        'batch',
        'pass',
        *(f'{name} ms' for name in names),
        'over eager',
        'over compiled',
        '% of copy',
        f'peak of {", ".join(names)} GiB',
    ]
    lines += ['', f'| {" | ".join(columns)} |', '| --- ' * len(columns) + '|']
    for (name, stage, image, batch), rows in grouped(document['rows']).items():
        if dtype not in (None, name):
            continue
        for key, title in PASSES:
            share = rows.get('ours', {}).get(f'{key}_percent_of_copy')
            peaks = [rows.get(x, {}).get(f'{key}_peak_bytes') for x in names]
            cells = [
                name,
                stage,
                image,
                batch,
                title,
                *(cell(rows.get(x), key) for x in names),
                ratio(rows, 'eager', key),
                ratio(rows, 'compiled', key),
                '' if share is None else f'{share:.0f}',
                ', '.join('-' if peak is None else f'{peak / 2**30:.2f}' for peak in peaks),
            ]
            lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def verdict(met: bool, text: str) -> str:
    """A goal's line."""
    return f'{"met" if met else "MISSED"}: {text}'


def core_goals(rows: list[Row]) -> list[str]:
    """The goals of the attention op, as far as there are rows."""
    groups = {
        (stage, batch): by
        for (dtype, stage, image, batch), by in grouped(rows).items()
        if dtype == 'bf16' and image == '800 x 1280' and batch >= 4
    }
    lines = []
    for ((stage, batch), by), (key, title) in itertools.product(sorted(groups.items()), PASSES):
        share = by.get('ours', {}).get(f'{key}_percent_of_copy')
        if stage <= 3 and batch >= COPY_BATCH and share is not None:
            text = f'{title} of stage {stage}, batch {batch}: {share:.0f} % of copy bandwidth, '
            lines.append(verdict(share >= COPY_GOAL, f'{text}goal {COPY_GOAL:.0f} %'))
    for batch, (key, title) in itertools.product(sorted({batch for _, batch in groups}), PASSES):
        by_stage = [groups.get((stage, batch), {}) for stage in DEPTHS]
        if all(key in by.get(name, {}) for by in by_stage for name in ('eager', 'ours')):
            eager, ours = (
                sum(depth * by[name][key]['median'] for by, depth in zip(by_stage, DEPTHS.values(), strict=True))
                for name in ('eager', 'ours')
            )
            lines.append(
                verdict(
                    eager / ours >= CORE_GOALS[key],
                    f'{title} of all attentions of MILA-T, batch {batch}: {eager / ours:.1f} x eager, '
                    f'goal {CORE_GOALS[key]:.0f} x',
                )
            )
    return lines


def step_goals(rows: list[Row]) -> list[str]:
    """The goals of a training step, as far as there are rows."""
    by = grouped(rows).get(('bf16', 'tiny', '800 x 1280', 2), {})
    lines = []
    for ours, (other, goal) in itertools.product(('ours', 'ours-fused'), STEP_GOALS.items()):
        if all('both' in by.get(name, {}) for name in (ours, other)):
            faster = by[other]['both']['median'] / by[ours]['both']['median']
            share = by[ours]['both_peak_bytes'] / by[other]['both_peak_bytes']
            title = f'training step of MILA-T, batch 2, {ours}:'
            lines += [
                verdict(faster >= goal, f'{title} {faster:.2f} x {other}, goal {goal} x'),
                verdict(share <= PEAK_GOAL, f'{title} {share:.2f} of the peak memory of {other}, goal {PEAK_GOAL}'),
            ]
    return lines + host_goals(by)


def host_goals(by: dict[str, Row]) -> list[str]:
    """The goals of the device's time, and of the wall clock beside it, as far as there are rows."""
    ours, peer, graphs = (by.get(name, {}) for name in ('ours', 'convnext-t', 'ours-graphs'))
    lines = []
    for key, title in PASSES:
        if graph := ours.get(f'{key}_graph'):
            goal = DEVICE_GOALS[key]
            lines.append(
                verdict(graph['median'] <= goal, f'{title} of MILA-T, device: {graph["median"]:.2f} ms, goal {goal} ms')
            )
    if 'both' in ours and 'both' in peer:
        wall = ours['both']['median'] / peer['both']['median']
        share = ours['both_peak_bytes'] / peer['both_peak_bytes']
        lines += [
            verdict(wall <= WALL_GOAL, f'wall clock of the step of MILA-T: {wall:.2f} x ConvNeXt-T, goal {WALL_GOAL}'),
            verdict(share <= 1, f'peak memory of the step of MILA-T: {share:.2f} x ConvNeXt-T, goal 1'),
        ]
    if 'both' in graphs and ours.get('both_graph'):
        over = graphs['both']['median'] / ours['both_graph']['median']
        text = f'wall clock of the step from CUDA graphs: {over:.2f} x its device time, goal {GRAPHS_GOAL}'
        lines.append(verdict(over <= GRAPHS_GOAL, text))
    return lines


def detector_goals(rows: list[Row]) -> list[str]:
    """MILA-T in a detector beside Swin-T and ConvNeXt-T."""
    rates = {row['backbone']: row['images_per_second'] for row in rows if 'images_per_second' in row}
    return [
        verdict(rates[ours] >= rates[other], f'{ours}: {rates[ours]:.2f} images/s, {other} {rates[other]:.2f}')
        for ours in ('MILA-T', 'MILA-T-graphs')
        for other in ('ConvNeXt-T', 'Swin-T')
        if ours in rates and other in rates
    ]


def fusion_goals(rows: list[Row]) -> list[str]:
    """The share of the copy bandwidth that the stencils reach."""
    lines = []
    for row in rows:
        fusion, stage = str(row['stage']).split()
        if row['implementation'] != 'ours' or row['dtype'] != 'bf16' or row['batch'] < COPY_BATCH or int(stage) > 3:
            continue
        if fusion in ('cpe_norm', 'dwc_silu', 'relu_dwc_relu') and 'both_percent_of_copy' in row:
            share = row['both_percent_of_copy']
            text = f'{fusion}, stage {stage}, batch {row["batch"]}: {share:.0f} % of copy bandwidth, '
            lines.append(verdict(share >= COPY_GOAL, f'{text}goal {COPY_GOAL:.0f} %'))
    return lines


def goals(document: dict[str, Any]) -> list[str]:
    """Each goal for speed that the result has the rows for, as met or missed, with its figure."""
    judge = {
        'attention_op': core_goals,
        'backbone': step_goals,
        'detector_step': detector_goals,
        'block_fusions': fusion_goals,
    }.get(document['benchmark'])
    return [] if judge is None else judge(document['rows'])


def plot(document: dict[str, Any], dtype: str, path: Path) -> None:
    """Bars of forward and forward + backward times, one group for each stage and size."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    groups = {key: rows for key, rows in grouped(document['rows']).items() if key[0] == dtype}
    labels = [f'{image} B={batch}\n{stage}' for _, stage, image, batch in groups]
    figure, axes = pyplot.subplots(2, 1, figsize=(max(8, len(groups)), 8), sharex=True)
    for axis, key, title in zip(axes, *zip(*PASSES, strict=True), strict=True):
        for index, name in enumerate(IMPLEMENTATIONS):
            places = [i for i, rows in enumerate(groups.values()) if key in rows.get(name, {})]
            heights = [list(groups.values())[i][name][key]['median'] for i in places]
            if places:
                axis.bar([i + 0.2 * (index - 1.5) for i in places], heights, 0.18, label=name)
        axis.set(yscale='log', ylabel='ms', title=f'{title}, {dtype}, {document["machine"]["gpu"]}')
        axis.legend()
    axes[1].set_xticks(range(len(labels)), labels, rotation=60, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Print the table; write the plot beside the JSON where matplotlib is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('result', type=Path)
    parser.add_argument('--dtype', help='only rows of this dtype in the table, and those of the plot')
    parser.add_argument('--plot', type=Path, help='default: the JSON with .png')
    args = parser.parse_args()
    document = json.loads(args.result.read_text(encoding='utf-8'))
    print(table(document, args.dtype))
    if lines := goals(document):
        print('\nGoals, bf16 at 800 x 1280:\n\n' + '\n'.join(f'- {line}' for line in lines))
    if importlib.util.find_spec('matplotlib') is None:
        print('matplotlib is not installed: no plot', file=sys.stderr)
        return 0
    path = args.plot or args.result.with_suffix('.png')
    plot(document, args.dtype or document['rows'][0]['dtype'], path)
    print(f'wrote {path}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
