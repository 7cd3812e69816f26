"""Exported files against PyTorch on this CPU: MILA's backbone, Mask R-CNN and UperNet, in turns, a process each.

    python -m benchmarks.deploy                      # the backbone at 512 x 512, 2 threads
    python -m benchmarks.deploy --models upernet mask_rcnn mask_rcnn_full --out benchmarks/results/deploy_models.json
    python -m benchmarks.deploy --docs               # write a table of docs/deploy.md from a JSON, that of --out

Weights are random: how long it takes does not depend on them, save for the number of boxes that a detector finds. The
thresholds of scores are such that ``mask_rcnn`` finds a few, and ``mask_rcnn_full`` as many as it may; the table says
how many. What a file computes is compared with the model before anything is timed; one that differs is not timed.
Rounds go over all of them in turn, so that a noisy machine disturbs all; the ratio is the median of the rounds' ratios
to PyTorch's. Each runtime is in a process of its own: in one, the threads of one that wait for work take the cores from
the others.
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
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.backbone_cpu import machine
from benchmarks.measure import write_docs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / 'benchmarks' / 'results' / 'deploy.json'
RUNTIMES = ('PyTorch eager', 'onnxruntime', 'onnxruntime int8 (dynamic)', 'OpenVINO f32', 'OpenVINO default')
CONFIGS = {
    'mask_rcnn': ('mask_rcnn_mila_t_1x', ['model.test_cfg.rcnn.score_thr=0.04']),
    'mask_rcnn_full': ('mask_rcnn_mila_t_1x', ['model.test_cfg.rcnn.score_thr=0.02']),
    'upernet': ('upernet_mila_t_160k', []),
}
EXACT = ('onnxruntime', 'OpenVINO f32')

Size = tuple[int, int]
Run = Callable[[], Any]
Row = dict[str, Any]


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


def write_backbone(size: Size, folder: Path) -> None:
    """Write the backbone as ONNX, and quantised by onnxruntime."""
    from onnxruntime.quantization import quantize_dynamic

    from mila_mm.ops.common import only_plain_operators

    with torch.no_grad(), only_plain_operators():
        program = torch.onnx.export(Backbone().eval(), (_image(size),), dynamo=True, verbose=False)
    program.save(folder / 'model.onnx')
    quantize_dynamic(folder / 'model.onnx', folder / 'int8.onnx', op_types_to_quantize=['MatMul'])


def _image(size: Size) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def load_backbone(runtime: str, size: Size, folder: Path) -> Run:
    """Make what is timed of the backbone in one runtime."""
    image = _image(size)
    if runtime == 'PyTorch eager':
        model = Backbone().eval().source

        def eager() -> list[np.ndarray]:
            with torch.inference_mode():
                return [x.numpy() for x in model(image)]

        return eager
    if runtime.startswith('OpenVINO'):
        return _openvino(
            folder / 'model.onnx', {} if 'default' in runtime else {'INFERENCE_PRECISION_HINT': 'f32'}, image
        )
    return _onnxruntime(folder / ('int8.onnx' if 'int8' in runtime else 'model.onnx'), image)


def _onnxruntime(path: Path, image: torch.Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, inputs)


def _openvino(path: Path, hint: dict[str, Any], image: torch.Tensor) -> Run:
    import openvino

    options = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), **hint}
    compiled = openvino.Core().compile_model(str(path), 'CPU', options)
    return lambda: [np.array(x) for x in compiled([image.numpy()]).values()]


def _whole(name: str) -> tuple[Any, Any]:
    from mmengine.registry import MODELS, init_default_scope

    from mila_mm.engine import load_config, scope_of
    from mila_mm.export.api import _without_pretrained
    from mila_mm.export.deployed import Deployed

    config, options = CONFIGS[name]
    cfg = load_config(str(ROOT / 'configs' / f'{config}.py'), options)
    init_default_scope(scope_of(cfg))
    _without_pretrained(cfg.model)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    return model, Deployed(model).eval()


def write_whole(name: str, size: Size, folder: Path) -> None:
    """Write a whole model, image to result, as ONNX."""
    from mila_mm.export.deployed import example_inputs
    from mila_mm.export.formats import FORMATS

    _, deployed = _whole(name)
    FORMATS['onnx'].write(folder / 'model.onnx', deployed, example_inputs(deployed, 1, *size), False, {})


def load_whole(name: str, runtime: str, size: Size, folder: Path) -> Run:
    """Make what is timed of a whole model in one runtime."""
    from mila_mm.export.deployed import example_inputs
    from mila_mm.export.formats import FORMATS
    from mila_mm.export.samples import predict

    model, deployed = _whole(name)
    inputs = example_inputs(deployed, 1, *size)
    arrays = {key: x.numpy() for key, x in zip(deployed.input_names, inputs, strict=True)}
    if runtime == 'PyTorch eager':
        return lambda: predict(model, deployed.kind, arrays['image'], np.array([size]))
    run = FORMATS['onnx'].load(folder / 'model.onnx', deployed, torch.get_num_threads())
    return lambda: run(arrays)


def serve(pipe: Connection, name: str, runtime: str, size: Size, folder: Path, threads: int) -> None:
    """Hold one runtime in a process of its own, whose threads disturb no other: the first result, then times."""
    torch.set_num_threads(threads)
    try:
        run = load_backbone(runtime, size, folder) if name == 'backbone' else load_whole(name, runtime, size, folder)
        first = run()
    except Exception as error:  # noqa: BLE001  what does not work is a row of the table
        pipe.send(f'{type(error).__name__}: {error}'.split('\n')[0][:200])
        return
    pipe.send(first)
    while pipe.recv():
        run()  # wakes the threads
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)


def judge(name: str, runtime: str, size: Size, results: Any, expected: Any) -> Row:
    """What a runtime computed, beside PyTorch: entries for its row; 'failed' where it should be the same and is not."""
    if name == 'backbone':
        apart = max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(results, expected, strict=True))
        wrong = runtime in EXACT and not apart < 1e-3
        return {'difference': f'{apart:.1e} of the largest', **({'failed': f'differs by {apart:.1e}'} if wrong else {})}
    from mila_mm.export.compare import TOLERANCES, Comparison, compare
    from mila_mm.export.metadata import settings_of

    if runtime == 'PyTorch eager':
        return {'difference': f'{len(expected[0]["scores"])} found' if 'scores' in expected[0] else ''}
    _, deployed = _whole(name)
    found = Comparison()
    compare(deployed.kind, results, expected, np.array([size]), TOLERANCES['fp32'], settings_of(deployed), found)
    return {'difference': found.summary(deployed.kind), **({'failed': found.faults[0]} if found.faults else {})}


def measure(name: str, size: Size, rounds: int, threads: int) -> list[Row]:
    """Time a model in all runtimes, in turns."""
    context, pipes, workers = get_context('spawn'), {}, []
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        if name == 'backbone':
            write_backbone(size, Path(folder))
        else:
            write_whole(name, size, Path(folder))
        firsts: dict[str, Any] = {}
        for runtime in RUNTIMES if name == 'backbone' else RUNTIMES[:2]:
            rows[runtime] = {'model': name, 'size': list(size), 'runtime': runtime}
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=serve, args=(theirs, name, runtime, size, Path(folder), threads), daemon=True
            )
            worker.start()
            theirs.close()  # so that a worker that is killed ends the wait for it
            workers.append(worker)
            first = ours.recv()
            if isinstance(first, str):
                rows[runtime]['failed'] = first
                continue
            firsts[runtime] = first
            rows[runtime] |= judge(name, runtime, size, first, firsts['PyTorch eager'])
            if 'failed' in rows[runtime]:
                ours.send(False)
            else:
                pipes[runtime] = ours
        times: dict[str, list[float]] = {runtime: [] for runtime in pipes}
        for _ in range(rounds):
            for runtime, pipe in pipes.items():
                pipe.send(True)
                times[runtime].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        for worker in workers:
            worker.join()
    base = times['PyTorch eager']
    for runtime, taken in times.items():
        rows[runtime]['ms'] = 1000 * statistics.median(taken)
        rows[runtime]['ratio'] = statistics.median(a / b for a, b in zip(taken, base, strict=True))
    return list(rows.values())


def table(document: dict[str, Any]) -> str:
    """The table of docs/deploy.md."""
    where = document['machine']
    packages = ', '.join(f'{name} {number}' for name, number in document['packages'].items())
    lines = [
        f'{where["cpu"]}, {where["threads"]} threads, torch {where["torch"]}, {packages}, {where["date"]}; batch 1, '
        f'medians of {document["rounds"]} rounds in turns, a process for each runtime, random weights.',
        '',
        '| model | image | runtime | ms | time over PyTorch eager | beside PyTorch |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in document['rows']:
        size = ' x '.join(map(str, row['size']))
        if 'failed' in row:
            lines.append(f'| {row["model"]} | {size} | {row["runtime"]} | - | - | does not work: {row["failed"]} |')
            continue
        cells = [row['model'], size, row['runtime'], f'{row["ms"]:.0f}', f'{row["ratio"]:.2f}', row['difference']]
        lines.append(f'| {" | ".join(cells)} |')
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
    rows = [row for name in args.models for row in measure(name, tuple(args.size), args.rounds, args.threads)]
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
