"""Predictions of a segmentor as a pickle."""

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import DumpResults
from mmengine.registry import METRICS


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """Dump a segmentor's label maps to a pickle, one dict per image.

    mmengine's class would keep the logits of all images in memory and write them: 0.6 GB per
    megapixel for the 150 classes of ADE20K. The label map is what evaluation reads.

    Args:
        out_file_path: Path that ends with ``.pkl`` or ``.pickle``.
        collect_device: Where ranks gather, 'cpu' or 'gpu'. Defaults to 'cpu'.
        collect_dir: Folder through which ranks gather. Defaults to None.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the predictions of a batch on the CPU.

        Args:
            data_batch: The batch, not used.
            data_samples: Samples as dicts, with ``pred_sem_seg``.
        """
        kept = [
            {key: value for key, value in sample.items() if key not in ('seg_logits', 'gt_sem_seg')}
            for sample in data_samples
        ]
        super().process(data_batch, kept)
