"""The config is laid out for people once data and model are checked, not before.

mmengine formats it three times while a run starts, for the log, the visualizer and the message hub, which takes
seconds; a run that is refused removes what it wrote.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.visualization import Visualizer

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.yapf_cache import import_yapf
from mila_mm.engine.runner.sharding import ShardingRunner

# Where hooks build what their config names, such as an averaged model.
_BUILDING_HOOKS = ('before_run', 'before_train', 'before_test')
_FIRST_BATCH_HOOKS = ('before_train_iter', 'before_val_iter', 'before_test_iter')


class LateConfigRunner(ShardingRunner):
    """Runner that logs its config after ``before_run``, and writes it to the work folder with the first batch."""

    _started = False

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call all hooks; the first batch marks the run as started."""
        if not self._started and fn_name in _FIRST_BATCH_HOOKS:
            self._started = True
            self.dump_config()
        if fn_name not in _BUILDING_HOOKS:
            super().call_hook(fn_name, **kwargs)
            return
        with building('hook'):
            if fn_name != 'before_run':
                super().call_hook(fn_name, **kwargs)
                return
            with _unformatted(self.cfg):  # RuntimeInfoHook hands it to the message hub
                super().call_hook(fn_name, **kwargs)
        self._show_config()

    def dump_config(self) -> None:
        """Write the config of a training into the work folder, once it has started; a test leaves it alone."""
        if self._started and self._train_dataloader is not None:
            super().dump_config()

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """Build the visualizer, which gets the config later."""
        built = super().build_visualizer(visualizer)
        vars(built)['add_config'] = lambda *_, **__: None
        return built

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Log the environment without the config, which follows later."""
        import_yapf()  # as mmengine does, in all processes at once
        cfg, self.cfg = self.cfg, Config()
        try:
            super()._log_env(env_cfg)
        finally:
            self.cfg = cfg

    def _show_config(self) -> None:
        """Log the config and give it to the visualizer and the message hub, the first time that it is asked for."""
        if vars(self.visualizer).pop('add_config', None) is None or not self.cfg:
            return
        text = self.cfg.pretty_text
        self.logger.info(f'Config:\n{text}')
        self.visualizer.add_config(self.cfg)
        if self.message_hub.get_info('cfg') is not None:
            self.message_hub.update_info('cfg', text)


@contextmanager
def _unformatted(cfg: Config) -> Iterator[None]:
    """Let a config give its text as it is, the same Python on long lines."""
    own = vars(cfg)  # the attributes of a Config are its entries
    formatted = own.get('_format_python_code', True)
    own['_format_python_code'] = False
    try:
        yield
    finally:
        own['_format_python_code'] = formatted
