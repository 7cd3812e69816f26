"""Exported files against PyTorch on this CPU: MILA's backbone and whole models, in turns and in one process.

    python -m benchmarks.deploy                      # the backbone, 2 threads
    python -m benchmarks.deploy --compile            # torch.compile of the backbone, too
    python -m benchmarks.deploy --models upernet mask_rcnn retinanet --out benchmarks/results/deploy_models.json
    python -m benchmarks.deploy --docs               # write a table of docs/deploy.md from a JSON, that of --out

Weights are random; classification layers are scaled so that detectors find as many boxes as they may, since time
depends on that. Whole models go from the image to boxes and pasted masks, or to labels; PyTorch is the model's own
test_step. Each file is compared with the model before anything is timed. Rounds go over all of them in turn, so that a
noisy machine disturbs all; the ratio is the median of the rounds' ratios to PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
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
CONFIGS = {
    'mask_rcnn': 'mask_rcnn_mila_t_1x',
    'upernet': 'upernet_mila_t_160k',
    'retinanet': 'swapped/retinanet_mila_t_1x',
}
# Height and width where --size gives no other
SIZES = dict(backbone=(512, 512), upernet=(512, 512), mask_rcnn=(800, 1344), retinanet=(800, 1344))
CLASSIFIES = ('fc_cls', 'retina_cls', 'rpn_cls', 'conv_seg')
Runs = dict[str, Callable[[], Any]]


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


def backbone(size: tuple[int, int], folder: Path, compiled: bool) -> tuple[Runs, dict[str, str]]:
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

    runs: Runs = {'PyTorch eager': eager}
    if compiled:
        fast = torch.compile(model.source)

        def run_compiled() -> list[np.ndarray]:
            with torch.inference_mode():
                return [x.numpy() for x in fast(image)]

        runs['torch.compile'] = run_compiled
    inputs = [image.numpy()]
    runs['onnxruntime'] = _onnxruntime(path, inputs)
    failed: dict[str, str] = {}
    try:
        runs['onnxruntime int8 (dynamic)'] = _onnxruntime(_quantised(path), inputs)
    except Exception as error:  # noqa: BLE001  what does not work is a row of the table
        failed['onnxruntime int8 (dynamic)'] = f'{type(error).__name__}: {error}'.split('\n')[0][:200]
    runs.update(_openvino(path, inputs, failed))
    return runs, failed


def _onnxruntime(path: Path, inputs: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # its threads would wait on our cores
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    named = {x.name: array for x, array in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, named)


def _quantised(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    target = path.with_name('int8.onnx')
    quantize_dynamic(path, target, op_types_to_quantize=['MatMul'])
    return target


def _openvino(path: Path, inputs: list[np.ndarray], failed: dict[str, str]) -> Runs:
    try:
        import openvino
    except ImportError:
        failed['OpenVINO'] = 'not installed'
        return {}
    runs: Runs = {}
    for name, hint in {'OpenVINO f32': {'INFERENCE_PRECISION_HINT': 'f32'}, 'OpenVINO default': {}}.items():
        options = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), **hint}
        compiled = openvino.Core().compile_model(str(path), 'CPU', options)
        runs[name] = lambda compiled=compiled: [np.array(x) for x in compiled(inputs).values()]
    return runs


def whole(name: str, size: tuple[int, int], folder: Path) -> tuple[Runs, dict[str, str], dict[str, str]]:
    """The same of a whole model, and what each file says beside the model."""
    from mila_mm.export.compare import TOLERANCES, Comparison, compare
    from mila_mm.export.deployed import Deployed, example_inputs
    from mila_mm.export.formats import FORMATS
    from mila_mm.export.metadata import settings_of
    from mila_mm.export.samples import inputs_of, load_images, predict

    model = _random_model(name)
    deployed = Deployed(model, pasted=hasattr(model, 'roi_head')).eval()
    images, sizes = load_images([], 1, *size), np.array([size])
    inputs = list(inputs_of(deployed, images, sizes).values())
    path = folder / f'{name}.onnx'
    FORMATS['onnx'].write(path, deployed, example_inputs(deployed, 1, *size), False, {})
    runs: Runs = {'PyTorch eager': lambda: predict(model, deployed.kind, images, sizes)}
    failed: dict[str, str] = {}
    files = {'onnxruntime': _onnxruntime(path, inputs), **_openvino(path, inputs, failed)}
    expected, same = runs['PyTorch eager'](), {}
    for key, run in files.items():
        found, limits = Comparison(), TOLERANCES['fp16' if 'default' in key else 'fp32']
        results = dict(zip(deployed.output_names, run(), strict=True))
        compare(deployed.kind, results, expected, sizes, limits, settings_of(deployed), found)
        same[key] = found.summary(deployed.kind)
    return {**runs, **files}, failed, same


def _random_model(name: str) -> nn.Module:
    from mmengine.registry import MODELS, init_default_scope

    from mila_mm.engine import load_config, scope_of
    from mila_mm.export.api import _without_pretrained

    cfg = load_config(str(ROOT / 'configs' / f'{CONFIGS[name]}.py'))
    init_default_scope(scope_of(cfg))
    _without_pretrained(cfg.model)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    for key, parameter in model.named_parameters():
        if any(part in key for part in CLASSIFIES) and key.endswith('weight'):
            parameter.data.mul_(0.5 / (parameter.data.std() * parameter[0].numel() ** 0.5))
        elif any(part in key for part in CLASSIFIES):
            parameter.data.normal_(-1, 1)
    return model


def difference(results: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest difference of maps relative to their largest value."""
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(results, expected, strict=True))


def measure(name: str, size: tuple[int, int], rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Time a model in all its forms."""
    same: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if name == 'backbone':
            runs, failed = backbone(size, Path(folder), compiled)
            firsts = {key: run() for key, run in runs.items()}
            for key, results in firsts.items():
                same[key] = f'maps within {difference(results, firsts["PyTorch eager"]):.1e} of the largest value'
        else:
            runs, failed, same = whole(name, size, Path(folder))
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - start)
    base = times['PyTorch eager']
    about = {'model': name, 'size': list(size)}
    rows = [
        {
            **about,
            'runtime': key,
            'ms': 1000 * statistics.median(taken),
            'ratio': statistics.median(a / b for a, b in zip(taken, base, strict=True)),
            'same': '' if key == 'PyTorch eager' else same[key],
        }
        for key, taken in times.items()
    ]
    return rows + [{**about, 'runtime': key, 'failed': why} for key, why in failed.items()]


def table(document: dict[str, Any]) -> str:
    """The table of docs/deploy.md."""
    where = document['machine']
    packages = ', '.join(f'{name} {number}' for name, number in document['packages'].items())
    busy = f'; {where["load"]:.1f} processes at work' if 'load' in where else ''
    lines = [
        f'{where["cpu"]}, {where["threads"]} threads, torch {where["torch"]}, {packages}, {where["date"]}; batch 1, '
        f'medians of {document["rounds"]} rounds in turns, random weights{busy}.',
        '',
        '| model | image | runtime | ms | time over PyTorch eager | beside PyTorch |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in document['rows']:
        size = ' x '.join(map(str, row['size']))
        if 'failed' in row:
            lines.append(f'| {row["model"]} | {size} | {row["runtime"]} | - | - | does not work: {row["failed"]} |')
            continue
        lines.append(
            f'| {row["model"]} | {size} | {row["runtime"]} | {row["ms"]:.0f} | {row["ratio"]:.2f} | {row["same"]} |'
        )
    return '\n'.join(lines)


def main() -> int:
    """Measure, print, write the JSON; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['backbone'], choices=['backbone', *CONFIGS])
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='of all models [each its own]')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--compile', action='store_true', help='torch.compile of the backbone, too')
    parser.add_argument('--out', type=Path, default=RESULT)
    parser.add_argument('--docs', action='store_true', help='write the table of docs/deploy.md from the JSON')
    args = parser.parse_args()
    if args.docs:
        write_docs(table(json.loads(args.out.read_text())), args.out.stem, ROOT / 'docs' / 'deploy.md')
        return 0
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        rows += measure(name, tuple(args.size or SIZES[name]), args.rounds, args.compile)
    packages = {}
    for name in ('onnx', 'onnxruntime', 'openvino'):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            continue
    where = {**machine(), 'load': os.getloadavg()[1]}
    document = {'machine': where, 'packages': packages, 'rounds': args.rounds, 'rows': rows}
    args.out.write_text(json.dumps(document, indent=2) + '\n')
    print(table(document))
    return 0


if __name__ == '__main__':
    sys.exit(main())
