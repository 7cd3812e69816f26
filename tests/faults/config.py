"""The configs of the runs under test, with their data."""

from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Laying out the config for the log and for each checkpoint is most of a short run's time. With _base_ it is a config of
# the old kind, which may import anything.
PLAIN = """
_base_ = []
import yapf.yapflib.yapf_api as yapf_api
yapf_api.FormatCode = lambda code, **_: (code, True)
del yapf_api
"""


def write_config(folder: Path, task: str, iterations: int) -> Path:
    """Write the data and the config of a run of seconds.

    Augmentation, stochastic depth, momentum, averaged weights, validation and the best checkpoint all carry state. What
    the config builds on is put into the one file: to find it in mmdet takes a second of each start.
    """
    from mila_mm.datasets.shapes import write_shapes
    from mila_mm.engine import load_config

    write_shapes(folder / 'shapes', num_train=10, num_val=2, size=64, seed=0)
    text = (HERE / f'{task}.config').read_text()
    path = folder / f'{task}.py'
    path.write_text(
        text.replace('$ROOT', str(ROOT))
        .replace('$DATA', str(folder / 'shapes'))
        .replace('$ITERATIONS', str(iterations))
        .replace('$EPOCHS', str(iterations // 5))
    )
    with mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda code, **_: (code, True)):
        path.write_text(load_config(str(path)).pretty_text + PLAIN)
    return path
