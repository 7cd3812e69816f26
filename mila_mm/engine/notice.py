"""Say what a user must not overlook where it can be seen: right before the first step."""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mila_mm.registry import HOOKS


@HOOKS.register_module()
class NoticeHook(Hook):
    """Log lines as warnings after everything that a start logs, hundreds of lines in mmengine.

    Args:
        notices: The lines.
    """

    priority = 'LOWEST'

    def __init__(self, notices: Sequence[str]) -> None:
        self.notices = tuple(notices)

    def before_train(self, runner: Runner) -> None:
        """Log the lines.

        Args:
            runner: The runner.
        """
        for notice in self.notices:
            runner.logger.warning(notice)
