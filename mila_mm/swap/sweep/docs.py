"""docs/swap_results.md: what became of each family of configs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from mila_mm.errors import UserError

MARK = '<!-- Made by tools/analysis_tools/sweep_swaps.py; do not edit. -->'
_MOST_NAMES = 3


def write_page(path: FilePath, results: Mapping[str, Any]) -> None:
    """Write a sweep's results as a Markdown page.

    Args:
        path: A new file, or one that an earlier sweep made; no other is overwritten.
        results: As :func:`mila_mm.swap.sweep.sweep.to_json` writes them.

    Raises:
        UserError: If there is another file.
    """
    if path.exists() and not (path.is_file() and path.read_text(encoding='utf-8').startswith(MARK)):
        raise UserError(
            f'--docs {path}: expected a new file, or a page of an earlier sweep that starts with the mark "{MARK}"; '
            'nothing was written'
        )
    path.write_text('\n'.join([MARK, '', '# MILA in every config of mmdet and mmseg', '', *generated(results)]))


def generated(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page below its title."""
    about, total, steps = results['about'], results['total'], results['steps']
    files = sum(total.values())
    settled = files - total.get('failed', 0)
    yield (
        f'{files} config files, MILA {about["arch"]}, {about["date"]}, {about["machine"]}; {about["versions"]}. '
        f'Swapped: {total.get("swapped", 0)}, refused with a reason: {total.get("refused", 0)}, failed: '
        f'{total.get("failed", 0)}; swapped or refused: {settled / files:.1%}.'
    )
    yield ''
    if steps:
        done = sum(step['ok'] for step in steps)
        yield (
            f'Of {len(steps)} families one config was trained by one step and predicted, with MILA nano on the CPU, '
            f'small generated images and annotations, nothing compiled: {done} did ({done / len(steps):.1%}).'
        )
        yield ''
    yield '## By family'
    yield ''
    yield '| family | swapped | refused | failed | one training step and prediction |'
    yield '| --- | --- | --- | --- | --- |'
    by_family = {_family(step['config']): step for step in steps}
    for family, counts in results['families'].items():
        cells = ' | '.join(str(counts.get(status, 0) or '') for status in ('swapped', 'refused', 'failed'))
        yield f'| `{family}` | {cells} | {_step_cell(by_family.get(family))} |'
    yield ''
    yield from _reasons('## Refused', results['reasons'], 'refused')
    yield from _reasons('## Failed', results['reasons'], 'failed')
    yield from _reasons('## Swapped, with heads that could not be run here', results['reasons'], 'swapped')
    yield from _failed_steps(steps)


def _family(config: str) -> str:
    scope, _, inner = config.partition('::')
    return f'{scope}/{inner.partition("/")[0]}'


def _step_cell(step: Mapping[str, Any] | None) -> str:
    if step is None:
        return ''
    return 'yes' if step['ok'] else 'no'


def _reasons(title: str, reasons: Sequence[Mapping[str, str]], status: str) -> Iterator[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for entry in reasons:
        if entry['status'] == status:
            names[entry['reason']].append(entry['config'])
    if not names:
        return
    yield title
    yield ''
    yield '| files | reason | such as |'
    yield '| --- | --- | --- |'
    for reason, configs in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
        folders = Counter(config.rpartition('/')[0] for config in configs)
        shown = ', '.join(f'`{name}`' for name in (configs if len(configs) <= _MOST_NAMES else folders))
        yield f'| {len(configs)} | {_cell(reason)} | {shown} |'
    yield ''


def _failed_steps(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    failed = [step for step in steps if not step['ok']]
    if not failed:
        return
    yield '## Representatives that did not train a step or predict'
    yield ''
    yield '| config | reason |'
    yield '| --- | --- |'
    for step in failed:
        yield f'| `{step["config"]}` | {_cell(step["reason"])} |'
    yield ''


def _cell(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')
