"""The table and the plot of a benchmark's JSON.

    python benchmarks/report.py benchmarks/results/attention_op.json [--dtype bf16] [--plot out.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
    lines = [f'{machine["gpu"]}, driver {machine["driver"]}, torch {machine["torch"]}, triton {machine["triton"]}, '
             f'commit {machine["commit"][:12]}, {machine["date"][:10]}']
    if 'copy_bandwidth' in document:
        lines[0] += f'; copy bandwidth {document["copy_bandwidth"] / 1e12:.2f} TB/s'
    lines += ['', '| dtype | stage | image | batch | pass | eager ms | compiled ms | ours ms | over eager '
              '| over compiled | % of copy | peak of eager, ours GiB |', '| --- ' * 12 + '|']
    for (name, stage, image, batch), rows in grouped(document['rows']).items():
        if dtype not in (None, name):
            continue
        for key, title in (('forward', 'forward'), ('both', 'forward + backward')):
            share = rows.get('ours', {}).get(f'{key}_percent_of_copy')
            peaks = [rows.get(x, {}).get(f'{key}_peak_bytes') for x in ('eager', 'ours')]
            lines.append(
                f'| {name} | {stage} | {image} | {batch} | {title} | '
                + ' | '.join(cell(rows.get(x), key) for x in ('eager', 'compiled', 'ours'))
                + f' | {ratio(rows, "eager", key)} | {ratio(rows, "compiled", key)} | '
                + f'{"" if share is None else f"{share:.0f}"} | '
                + ', '.join('' if peak is None else f'{peak / 2**30:.2f}' for peak in peaks) + ' |')
    return '\n'.join(lines)


def plot(document: dict[str, Any], dtype: str, path: Path) -> None:
    """Bars of forward and forward + backward times, one group for each stage and size."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    groups = {key: rows for key, rows in grouped(document['rows']).items() if key[0] == dtype}
    labels = [f'{image} B={batch}\n{stage}' for _, stage, image, batch in groups]
    figure, axes = pyplot.subplots(2, 1, figsize=(max(8, len(groups)), 8), sharex=True)
    for axis, key, title in zip(axes, ('forward', 'both'), ('forward', 'forward + backward'), strict=True):
        for index, name in enumerate(('eager', 'compiled', 'ours')):
            places = [i for i, rows in enumerate(groups.values()) if key in rows.get(name, {})]
            heights = [list(groups.values())[i][name][key]['median'] for i in places]
            axis.bar([i + 0.27 * (index - 1) for i in places], heights, 0.25, label=name)
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
    if importlib.util.find_spec('matplotlib') is None:
        print('matplotlib is not installed: no plot', file=sys.stderr)
        return 0
    path = args.plot or args.result.with_suffix('.png')
    plot(document, args.dtype or document['rows'][0]['dtype'], path)
    print(f'wrote {path}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
