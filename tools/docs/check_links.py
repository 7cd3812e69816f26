"""Follows every link inside the built site: ``python tools/docs/check_links.py docs/_build/html``.

Files, pictures and anchors; addresses elsewhere are asked by ``make docs-links``.
"""

import os
import sys
from functools import cache
from pathlib import Path

from bs4 import BeautifulSoup


@cache
def page(path: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the anchors of a page, and what it links to and shows."""
    soup = BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
    links = [str(tag['href']) for tag in soup.select('a[href]')] + [str(tag['src']) for tag in soup.select('img[src]')]
    return frozenset(str(tag['id']) for tag in soup.select('[id]')), tuple(links)


def broken(path: Path) -> list[str]:
    """Return the links of a page that lead nowhere in the site."""
    wrong = []
    for link in page(path)[1]:
        name, _, anchor = link.partition('#')
        if link.startswith(('http:', 'https:', 'mailto:', 'data:')):
            continue
        target = Path(os.path.normpath(path.parent / name)) if name else path
        if not target.exists() or (anchor and target.suffix == '.html' and anchor not in page(target)[0]):
            wrong.append(f'{path}: {link}')
    return wrong


def main() -> None:
    """Check a built site, the highlighted sources apart; exit with 1 and the broken links where there are some."""
    site = Path(sys.argv[1])
    paths = [path for path in sorted(site.rglob('*.html')) if '_modules' not in path.parts]
    wrong = [line for path in paths for line in broken(path)]
    if wrong:
        sys.exit('\n'.join(wrong))
    print(f'{site}: {sum(len(page(path)[1]) for path in paths)} links on {len(paths)} pages, none broken')


if __name__ == '__main__':
    main()
