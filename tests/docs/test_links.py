"""Links lead somewhere: to files, to headings, and what is named in passing exists."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# Text that links to a place, with or without a heading; addresses are asked by `make docs-links`
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
# Paths of the repository in code font: what a reader would open or run
NAMED = re.compile(r'`((?:benchmarks|configs|docs|examples|mila_mm|tests|tools)/[\w./-]*[\w/])`')
# Written by a command that its page says has not run yet
MADE = {'benchmarks/results/block_fusions.json'}
MENTIONED = re.compile(r'\bdocs/[\w/]+\.(?:md|ipynb)\b')


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub and MyST give to a page's headings."""
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r'^#{1,6} +(.*?) *#*$', text, re.MULTILINE):
        words = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '').lower()
        slug = re.sub(r'[^\w\- ]', '', words).replace(' ', '-')
        anchors.add(f'{slug}-{found[slug]}' if found[slug] else slug)
        found[slug] += 1
    return anchors


def broken(page: str, text: str, others: dict[str, str], prose: Callable[[str], str]) -> list[str]:
    """List what a page links to and is not there."""
    wrong = []
    for target in LINK.findall(prose(text)):
        if re.match(r'[a-z]+:', target):
            continue
        name, _, anchor = target.partition('#')
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or not path.resolve().is_relative_to(ROOT):
            wrong.append(f'{page}: {target}: no such file')
            continue
        leads_to = path.resolve().relative_to(ROOT).as_posix()
        if anchor and anchor not in slugs(prose(others.get(leads_to, ''))):
            wrong.append(f'{page}: {target}: no such heading')
    return wrong


def test_links_lead_to_files_and_headings(pages, prose) -> None:
    wrong = [line for page, text in pages.items() for line in broken(page, text, pages, prose)]
    assert not wrong, '\n'.join(wrong)
    assert sum(len(LINK.findall(text)) for text in pages.values()) > 100


@pytest.mark.parametrize(
    ('link', 'says'),
    [
        ('[a](docs/nothing.md)', 'no such file'),
        ('[a](docs/swap.md#not-a-heading)', 'no such heading'),
        ('[a](../outside.md)', 'no such file'),
        ('[a](#here)', 'no such heading'),
    ],
)
def test_a_link_that_leads_nowhere_is_found(pages, prose, link: str, says: str) -> None:
    (line,) = broken('README.md', f'# There\n\n{link}\n', {**pages, 'README.md': '# There\n'}, prose)
    assert line.endswith(says)


def test_anchors_are_those_of_github() -> None:
    text = '# What `mila` does: a, b & c\n## Same\n## Same\n### [Link](x.md), *stressed*\n'
    assert slugs(text) == {'what-mila-does-a-b--c', 'same', 'same-1', 'link-stressed'}


def test_paths_that_pages_name_exist(pages, prose) -> None:
    wrong = []
    for page, text in pages.items():
        for name in NAMED.findall(prose(text)):
            if name not in MADE and not (ROOT / name).exists():
                wrong.append(f'{page}: {name}')
    assert not wrong, '\n'.join(wrong)


def test_pages_that_code_and_pages_mention_exist(pages) -> None:
    sources = [
        path for folder in ('mila_mm', 'benchmarks', 'tools', 'configs') for path in (ROOT / folder).rglob('*.py')
    ]
    texts = {**{path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in sources}, **pages}
    wrong = [f'{where}: {name}' for where, text in texts.items() for name in MENTIONED.findall(text)
             if not (ROOT / name).is_file()]  # fmt: skip
    assert not wrong, '\n'.join(wrong)


def files_of(entry: object) -> list[str]:
    """Return the files that a part of the table of contents names."""
    if isinstance(entry, dict):
        own = [entry['file']] if 'file' in entry else []
        return own + [file for value in entry.values() for file in files_of(value)]
    return [file for each in entry for file in files_of(each)] if isinstance(entry, list) else []


def test_the_site_has_every_page_once() -> None:
    toc = yaml.safe_load((ROOT / 'docs/_toc.yml').read_text(encoding='utf-8'))
    listed = [toc['root'], *files_of(toc['subtrees'])]
    docs = ROOT / 'docs'
    there = [path.relative_to(docs).with_suffix('').as_posix() for path in (*docs.glob('*.md'), *docs.rglob('*.ipynb'))]
    there = [name for name in there if not name.startswith('_')]
    assert not sorted(set(there) - set(listed)), 'add these pages to docs/_toc.yml'
    assert len(listed) == len(set(listed))
    assert not [name for name in listed if not name.startswith('_generated/') and name not in there]


def test_every_page_has_a_picture_or_something_to_run(pages, prose) -> None:
    """A page that a command writes names it in its first line."""
    for page, text in pages.items():
        if page.startswith('docs/') and not re.match(r'<!-- Made by [`\w]', text):
            code = text != prose(text) or re.search(r'^ {4}(python|mila|tools/)', text, re.MULTILINE)
            runs = re.search(r'`(python (-m|tools/)|mila |make |pytest )', text)
            assert code or runs or '![' in text, f'{page}: neither a picture nor a command'
