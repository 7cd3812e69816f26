"""mmengine's training loops, which can go on in the middle of an epoch."""

from collections.abc import Sequence
from typing import Any

from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import loops
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from mila_mm.engine.runner.sampler import ResumableBatchSampler
from mila_mm.registry import LOOPS


@LOOPS.register_module()
class EpochBasedTrainLoop(MMEngineEpochBasedTrainLoop):
    """Loop over epochs, the first of which may have been begun by an earlier run.

    Takes the arguments of :class:`mmengine.runner.EpochBasedTrainLoop`.

    Attributes:
        batches_done: Batches of the current epoch that are done, among them the one whose hooks are running.
    """

    batches_done = 0

    def run_epoch(self) -> None:
        """Do an epoch, or what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        first = self.batches_done
        if first < len(self.dataloader):  # else only what comes after an epoch is left to do
            if isinstance(self.dataloader.batch_sampler, ResumableBatchSampler):
                self.dataloader.batch_sampler.start_at(self._epoch, first)
            for index, batch in enumerate(self.dataloader, start=first):
                self.run_iter(index, batch)
        self.batches_done = 0
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Do an iteration."""
        self.batches_done = idx + 1
        super().run_iter(idx, data_batch)

    def validation_is_due(self) -> bool:
        """Tell whether a validation belongs to where the loop stands.

        Returns:
            True after an epoch that one follows.
        """
        self._decide_current_val_interval()
        if self.runner.val_loop is None or self._epoch == 0 or self.batches_done or self._epoch < self.val_begin:
            return False
        return self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs


@LOOPS.register_module()
class IterBasedTrainLoop(MMEngineIterBasedTrainLoop):
    """Loop over iterations, which skips what is done without loading it.

    Takes the arguments of :class:`mmengine.runner.IterBasedTrainLoop`.
    """

    def run(self) -> Any:
        """Train."""
        self.dataloader_iterator = _SkippingIterator(self.dataloader)
        return super().run()

    def validation_is_due(self) -> bool:
        """Tell whether a validation belongs to where the loop stands.

        Returns:
            True after an iteration that one follows.
        """
        self._decide_current_val_interval()
        if self.runner.val_loop is None or self._iter == 0 or self._iter < self.val_begin:
            return False
        return self._iter % self.val_interval == 0 or self._iter == self._max_iters


class _SkippingIterator(_InfiniteDataloaderIterator):
    def __init__(self, dataloader: DataLoader) -> None:
        # Not mmengine 0.10.7's own: it starts the workers here, and where they persist a second start closes the stream
        # of an InfiniteSampler for good.
        self._dataloader: DataLoader = dataloader
        self._iterator: Any = None
        self._epoch = 0

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._dataloader)
        return super().__next__()

    def skip_iter(self, num_iters: int) -> None:
        """Skip batches: their indices are drawn, nothing is loaded."""
        batches = self._dataloader.batch_sampler
        if isinstance(batches, ResumableBatchSampler):
            self._epoch = batches.start_at(0, num_iters)
        else:
            super().skip_iter(num_iters)


# What mmengine's loop makes as soon as it is built.
loops._InfiniteDataloaderIterator = _SkippingIterator
