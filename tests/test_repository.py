"""What the files around the package say of each other."""

import configparser
import re
from pathlib import Path

import yaml
from packaging.version import Version

import mila_mm

ROOT = Path(__file__).resolve().parents[1]


def pins(path: Path) -> dict[str, str]:
    """Return name -> version of a requirements file."""
    return dict(re.findall(r'^([\w.-]+)==(\S+)$', path.read_text(encoding='utf-8'), re.MULTILINE))


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding='utf-8'))


def test_hooks_before_a_commit_use_the_pinned_tools() -> None:
    hooks = [hook for repo in read_yaml('.pre-commit-config.yaml')['repos'] for hook in repo['hooks']]
    asked = [dependency.split('==') for hook in hooks for dependency in hook['additional_dependencies']]
    assert {'ruff-check', 'ruff-format', 'end-of-file-fixer', 'check-added-large-files'} <= {h['id'] for h in hooks}
    pinned = pins(ROOT / 'requirements.txt')
    assert {name: version for name, version in asked if name in pinned} == {'ruff': pinned['ruff']}


def test_the_oldest_packages_that_are_let_in_are_tested() -> None:
    """``make test-oldest`` and ``make test-classic`` run what the lower bounds of setup.cfg say."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    extras = setup['options.extras_require']
    oldest = pins(ROOT / 'requirements.txt') | pins(ROOT / 'requirements-oldest.txt')
    for tested, needed in (
        (oldest, [setup['options']['install_requires'], *(extras[name] for name in ('onedl', 'export', 'predict'))]),
        (pins(ROOT / 'requirements-classic.txt'), [extras['classic']]),
    ):
        bounds = dict(re.findall(r'^([\w.-]+)>=([\d.]+)', '\n'.join(needed), re.MULTILINE))
        assert bounds
        assert {name: Version(bound) for name, bound in bounds.items()} == {n: Version(tested[n]) for n in bounds}


def test_the_workflow_runs_what_contributors_run() -> None:
    steps = read_yaml('.github/workflows/ci.yml')['jobs']['test']['steps']
    assert '.ci/run' in [step.get('run') for step in steps]
    script = (ROOT / '.ci' / 'run').read_text(encoding='utf-8').splitlines()
    assert script[-2:] == ['make lint', 'make test']


def test_the_citation_is_of_this_version_and_of_the_papers_authors() -> None:
    citation = read_yaml('CITATION.cff')
    assert citation['version'] == mila_mm.__version__
    (paper,) = citation['references']
    named = ' and '.join(f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors'])
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert f'author={{{named}}}' in readme and paper['title'] in readme


def test_forms_for_issues_are_forms() -> None:
    for name in ('bug', 'feature'):
        form = read_yaml(f'.github/ISSUE_TEMPLATE/{name}.yml')
        assert form['name'] and form['description']
        assert all(field['attributes']['label'] for field in form['body'])
