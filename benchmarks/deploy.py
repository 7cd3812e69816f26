"""Exported files against PyTorch on this CPU: MILA's backbone, Mask R-CNN and UperNet, in turns and in one process.

    python -m benchmarks.deploy                      # the backbone at 512 x 512, 2 threads
    python -m benchmarks.deploy --models upernet mask_rcnn --out benchmarks/results/deploy_models.json
    python -m benchmarks.deploy --docs               # write a table of docs/deploy.md from a JSON, that of --out

Weights are random: how long it takes does not depend on them, save for the number of boxes that a detector finds. Each
file's maps are compared with the model's before anything is timed. Rounds go over all of them in turn, so that a noisy
machine disturbs all; the ratio is the median of the rounds' ratios to PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.backbone_cpu import machine
from benchmarks.measure import write_docs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / 'benchmarks' / 'results' / 'deploy.json'
CONFIGS = {'mask_rcnn': 'mask_rcnn_mila_t_1x', 'upernet': 'upernet_mila_t_160k'}


class Backbone(nn.Module):
    """MILA-T as exported whole models hold it: BatchNorms folded."""

    def __init__(self) -> None:
        super().__init__()
        from mila_mm.export.pieces import deployable
        from mila_mm.models import MILATrunk

        torch.manual_seed(0)
        self.source = MILATrunk('tiny').eval()
        self.folded = deployable(self.source)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the four maps."""
        return self.folded(image)


def backbone(size: tuple[int, int], folder: Path) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Make what is timed of the backbone, by name, and say what could not be made."""
    from mila_mm.ops.common import only_plain_operators

    model = Backbone().eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad(), only_plain_operators():
        program = torch.onnx.export(model, (image,), dynamo=True, verbose=False)
    path = folder / 'backbone.onnx'
    program.save(path)

    def eager() -> list[np.ndarray]:
        with torch.inference_mode():
            return [x.numpy() for x in model.source(image)]

    runs: dict[str, Callable[[], Any]] = {'PyTorch eager': eager, 'onnxruntime': _onnxruntime(path, image)}
    failed: dict[str, str] = {}
    try:
        runs['onnxruntime int8 (dynamic)'] = _onnxruntime(_quantised(path), image)
    except Exception as error:  # noqa: BLE001  what does not work is a row of the table
        failed['onnxruntime int8 (dynamic)'] = f'{type(error).__name__}: {error}'.split('\n')[0][:200]
    runs.update(_openvino(path, image, failed))
    return runs, failed


def _onnxruntime(path: Path, image: torch.Tensor) -> Callable[[], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # its threads would wait on our cores
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, inputs)


def _quantised(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    target = path.with_name('int8.onnx')
    quantize_dynamic(path, target, op_types_to_quantize=['MatMul'])
    return target


def _openvino(path: Path, image: torch.Tensor, failed: dict[str, str]) -> dict[str, Callable[[], list[np.ndarray]]]:
    try:
        import openvino
    except ImportError:
        failed['OpenVINO'] = 'not installed'
        return {}
    runs = {}
    for name, hint in {'OpenVINO f32': {'INFERENCE_PRECISION_HINT': 'f32'}, 'OpenVINO default': {}}.items():
        options = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), **hint}
        compiled = openvino.Core().compile_model(str(path), 'CPU', options)
        runs[name] = lambda compiled=compiled: [np.array(x) for x in compiled([image.numpy()]).values()]
    return runs


def whole(name: str, size: tuple[int, int], folder: Path) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The same of a whole model, image to result."""
    from mmengine.registry import MODELS, init_default_scope

    from mila_mm.engine import load_config, scope_of
    from mila_mm.export.api import _without_pretrained
    from mila_mm.export.deployed import Deployed, example_inputs
    from mila_mm.export.formats import FORMATS
    from mila_mm.export.samples import predict

    cfg = load_config(str(ROOT / 'configs' / f'{CONFIGS[name]}.py'))
    init_default_scope(scope_of(cfg))
    _without_pretrained(cfg.model)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    deployed = Deployed(model).eval()
    inputs = example_inputs(deployed, 1, *size)
    arrays = {key: x.numpy() for key, x in zip(deployed.input_names, inputs, strict=True)}
    path = folder / f'{name}.onnx'
    FORMATS['onnx'].write(path, deployed, inputs, False, {})
    run = FORMATS['onnx'].load(path, deployed, torch.get_num_threads())
    sizes = np.array([size])
    return {
        'PyTorch eager': lambda: predict(model, deployed.kind, arrays['image'], sizes),
        'onnxruntime': lambda: run(arrays),
    }, {}


def difference(results: Any, expected: Any) -> float | None:
    """Largest difference of maps relative to their largest value; None for results of other kinds."""
    if not isinstance(results, list) or not isinstance(results[0], np.ndarray):
        return None
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(results, expected, strict=True))


def measure(name: str, size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Time a model in all its forms."""
    with tempfile.TemporaryDirectory() as folder:
        make = backbone if name == 'backbone' else None
        runs, failed = make(size, Path(folder)) if make else whole(name, size, Path(folder))
        firsts = {key: run() for key, run in runs.items()}
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - start)
    base = times['PyTorch eager']
    rows = [
        {
            'model': name,
            'size': list(size),
            'runtime': key,
            'ms': 1000 * statistics.median(taken),
            'ratio': statistics.median(a / b for a, b in zip(taken, base, strict=True)),
            'difference': difference(firsts[key], firsts['PyTorch eager']),
        }
        for key, taken in times.items()
    ]
    return rows + [{'model': name, 'size': list(size), 'runtime': key, 'failed': why} for key, why in failed.items()]


def table(document: dict[str, Any]) -> str:
    """The table of docs/deploy.md."""
    where = document['machine']
    packages = ', '.join(f'{name} {number}' for name, number in document['packages'].items())
    lines = [
        f'{where["cpu"]}, {where["threads"]} threads, torch {where["torch"]}, {packages}, {where["date"]}; batch 1, '
        f'medians of {document["rounds"]} rounds in turns, random weights.',
        '',
        '| model | image | runtime | ms | time over PyTorch eager | largest relative difference of the maps |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in document['rows']:
        size = ' x '.join(map(str, row['size']))
        if 'failed' in row:
            lines.append(f'| {row["model"]} | {size} | {row["runtime"]} | - | - | does not work: {row["failed"]} |')
            continue
        apart = '' if row['difference'] is None else f'{row["difference"]:.1e}'
        lines.append(f'| {row["model"]} | {size} | {row["runtime"]} | {row["ms"]:.0f} | {row["ratio"]:.2f} | {apart} |')
    return '\n'.join(lines)


def main() -> int:
    """Measure, print, write the JSON; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['backbone'], choices=['backbone', *CONFIGS])
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512), metavar=('H', 'W'))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--out', type=Path, default=RESULT)
    parser.add_argument('--docs', action='store_true', help='write the table of docs/deploy.md from the JSON')
    args = parser.parse_args()
    if args.docs:
        write_docs(table(json.loads(args.out.read_text())), args.out.stem, ROOT / 'docs' / 'deploy.md')
        return 0
    torch.set_num_threads(args.threads)
    rows = [row for name in args.models for row in measure(name, tuple(args.size), args.rounds)]
    packages = {}
    for name in ('onnx', 'onnxruntime', 'openvino'):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            continue
    document = {'machine': machine(), 'packages': packages, 'rounds': args.rounds, 'rows': rows}
    args.out.write_text(json.dumps(document, indent=2) + '\n')
    print(table(document))
    return 0


if __name__ == '__main__':
    sys.exit(main())
