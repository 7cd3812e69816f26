"""README's figures are those of the files that it names."""

import json
import re
from pathlib import Path

import yaml

from mila_mm.swap.sweep.docs import write_page

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def rows(heading: str) -> list[list[str]]:
    """Return the rows of a section's tables, headings apart."""
    section = re.search(rf'^## {heading}$(.*?)(?=^## )', README, re.MULTILINE | re.DOTALL)[1]
    found = [[cell.strip() for cell in line[1:-1].split('|')] for line in section.splitlines() if line.startswith('|')]
    return [row for row in found if row[0] and not set(row[0]) <= {'-'}]


def test_published_results_and_costs_are_those_of_the_metafile() -> None:
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text(encoding='utf-8'))['Models']
    table = {row[0].split(']')[0].lstrip('['): row for row in rows('Results') if row[0].startswith('[')}
    for model in models:
        name = model['Name']
        figures = {key: value for result in model.get('Results', []) for key, value in result['Metrics'].items()}
        if name.endswith('single_scale'):
            assert name not in table and not figures
            continue
        shown = table.pop(name)
        costs = [value for key, value in model['Metadata'].items() if key.startswith(('Parameters', 'MACs'))]
        assert not costs or shown[1:3] == [f'{costs[0]} M', f'{costs[1]} G'], name
        expected = [str(value) for value in figures.values()] or ['', '']
        assert shown[3:5] == expected, name
        assert not any(shown[5:]), f'{name}: nothing of ours has been run'
    assert not table


def test_speed_is_that_of_the_result() -> None:
    result = json.loads((ROOT / 'benchmarks/results/backbone_cpu.json').read_text(encoding='utf-8'))
    table = {row[0]: row[1:] for row in rows('Speed')}
    for name, key in (('forward, eval', 'forward'), ('forward + backward, train', 'forward_backward')):
        got = result[key]
        ratio = f'{got["ratio"]:.2f} ({got["ratio_q1"]:.2f} to {got["ratio_q3"]:.2f})'
        assert table[name] == [f'{got[side] * 1000:.0f} ms' for side in ('transcription_s', 'mila_mm_s')] + [ratio]
        assert f'{got["ratio"]:.2f}' in README.partition('**It is faster')[2].partition('- **')[0]
    machine = result['machine']
    assert f'{machine["cpu"]} (torch {machine["torch"].split("+")[0]}, {machine["date"]})' in README


def test_the_page_of_the_sweep_is_that_of_its_result(tmp_path: Path) -> None:
    results = json.loads((ROOT / 'benchmarks/results/swap_sweep.json').read_text(encoding='utf-8'))
    write_page(tmp_path / 'page.md', results)
    text = (tmp_path / 'page.md').read_text(encoding='utf-8')
    assert (ROOT / 'docs/swap_results.md').read_text(encoding='utf-8') == text
    swap = (ROOT / 'docs/swap.md').read_text(encoding='utf-8')
    configs, swapped, refused = re.search(r'Of (\d+) config files (\d+) were swapped, (\d+) refused', swap).groups()
    assert f'{configs} config files' in text and f'Swapped: {swapped}, refused with a reason: {refused}' in text


def test_every_section_with_figures_says_where_they_are_from() -> None:
    for heading in ('The demo', 'Results', 'Speed'):
        section = re.search(rf'^## {heading}$(.*?)(?=^## )', README, re.MULTILINE | re.DOTALL)[1]
        assert re.search(r'\]\((docs|benchmarks|configs)/', section), heading
