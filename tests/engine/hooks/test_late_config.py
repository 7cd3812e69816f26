"""When a run lays out its config for people: once nothing refuses it, and in full."""

from pathlib import Path

import pytest
from mmengine.hooks import Hook
from small_run import run

from mila_mm.engine.config.yapf_cache import import_yapf
from mila_mm.errors import UserError


class Refuses(Hook):
    """Refuses every run, after all other hooks."""

    priority = 'LOWEST'

    def before_run(self, runner: object) -> None:
        """Refuse."""
        raise UserError('refused')


def test_a_run_that_is_refused_lays_out_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_yapf(), 'FormatCode', lambda *_, **__: pytest.fail('the config is laid out'))
    with pytest.raises(UserError, match='refused'):
        run(tmp_path / 'run', hooks=[Refuses()])


def test_a_run_that_starts_shows_its_config_as_before(tmp_path: Path) -> None:
    runner = run(tmp_path / 'run').runner
    text = runner.cfg.pretty_text
    assert text.count('\n') > 10
    (shown,) = (tmp_path / 'run').rglob('vis_data/config.py')
    assert shown.read_text() == text
    assert runner.message_hub.get_info('cfg') == text
    assert vars(runner.visualizer).get('add_config') is None


def test_the_log_holds_the_config_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    class Listens(Hook):
        def before_run(self, runner: object) -> None:
            monkeypatch.setattr(runner.logger, 'info', lambda text, *_: said.append(text))

    runner = run(tmp_path / 'run', hooks=[Listens()]).runner
    assert [text for text in said if text.startswith('Config:')] == [f'Config:\n{runner.cfg.pretty_text}']
