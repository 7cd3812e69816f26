"""What 8 bits make of an exported file: onnxruntime's quantisers, dynamic and static, against the file itself.

    python -m benchmarks.int8 model.onnx --images FOLDER                # prints a table
    python -m benchmarks.int8 model.onnx --images FOLDER --out int8.json

The images calibrate the static one and are what results are compared on, so that its numbers are the best that can be
expected. A detector's found objects are counted that a detection of the quantised file matches: same label, boxes
within 2 pixels, scores within 0.05.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mmcv
import numpy as np

from benchmarks.backbone_cpu import machine

NEAR = dict(boxes=2.0, scores=0.05, masks=0.9, pixels=0.99, logits=0.05, unmatched=0.0)


def inputs_of(path: Path, images: list[Path]) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """Return a file's metadata, and inputs of it from images that are stretched to its size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    height, width = about['size']
    inputs = []
    for image in images:
        pixels = mmcv.imresize(mmcv.imread(str(image), channel_order='rgb'), (width, height))
        named = {'image': np.stack([pixels] * about['batch']), 'size': np.array([[height, width]] * about['batch'])}
        inputs.append({x.name: named[x.name] for x in session.get_inputs()})
    return about, inputs


def dynamic(source: Path, target: Path, inputs: list[dict[str, np.ndarray]], only: tuple[str, ...] = ()) -> None:
    """Weights in 8 bits, activations quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, op_types_to_quantize=list(only) or None)


def dynamic_products(source: Path, target: Path, inputs: list[dict[str, np.ndarray]]) -> None:
    """The same for matrix products alone."""
    dynamic(source, target, inputs, ('MatMul',))


def static(source: Path, target: Path, inputs: list[dict[str, np.ndarray]], only: tuple[str, ...] = ()) -> None:
    """Weights and activations in 8 bits, by the ranges that the inputs come to; weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        """The inputs, once each."""

        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next one."""
            return next(self.left, None)

    quantize_static(source, target, Reader(), per_channel=True, op_types_to_quantize=list(only) or None)


def static_layers(source: Path, target: Path, inputs: list[dict[str, np.ndarray]]) -> None:
    """The same for convolutions and matrix products alone."""
    static(source, target, inputs, ('Conv', 'MatMul'))


WAYS: dict[str, Callable[[Path, Path, list[dict[str, np.ndarray]]], None]] = {
    'dynamic, all operators': dynamic,
    'dynamic, MatMul': dynamic_products,
    'static, all operators': static,
    'static, Conv and MatMul': static_layers,
}


def run(path: Path, inputs: list[dict[str, np.ndarray]]) -> tuple[list[dict[str, np.ndarray]], float]:
    """Results by name for each of the inputs, and median seconds of one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [x.name for x in session.get_outputs()]
    results, seconds = [], []
    for named in inputs:
        start = time.perf_counter()
        results.append(dict(zip(names, session.run(None, named), strict=True)))
        seconds.append(time.perf_counter() - start)
    return results, median(seconds)


def agreement(kind: str, results: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> str:
    """How far results are those of the file, in words."""
    from mila_mm.export.compare import Tolerance, match

    if kind == 'segmentor':
        same = np.mean([(a['labels'] == b['labels']).mean() for a, b in zip(results, wanted, strict=True)])
        return f'{100 * same:.2f} % of the labels'
    if kind == 'classifier':
        apart = max(abs(a['scores'] - b['scores']).max() for a, b in zip(results, wanted, strict=True))
        return f'scores within {apart:.2g}'
    found = matched = 0
    for a, b in zip(results, wanted, strict=True):
        (few, many) = ({key: x[key][0][: x['count'][0]] for key in ('boxes', 'scores', 'labels')} for x in (a, b))
        found += len(many['scores'])
        matched += len(match(few, many, Tolerance(**NEAR))[0])
    return f'{matched} of {found} detections'


def measure(path: Path, images: list[Path]) -> list[dict[str, Any]]:
    """Quantise a file in all ways and compare each."""
    about, inputs = inputs_of(path, images)
    wanted, base = run(path, inputs)
    rows: list[dict[str, Any]] = [{'file': 'as exported', 'mb': path.stat().st_size / 1e6, 'ratio': 1.0, 'same': ''}]
    with tempfile.TemporaryDirectory() as folder:
        for name, quantise in WAYS.items():
            target = Path(folder) / 'int8.onnx'
            try:
                quantise(path, target, inputs)
                results, seconds = run(target, inputs)
            except Exception as error:  # noqa: BLE001  what does not work is a row of the table
                rows.append({'file': name, 'failed': f'{type(error).__name__}: {error}'.split('\n')[0][:160]})
                continue
            same = agreement(about['kind'], results, wanted)
            rows.append({'file': name, 'mb': target.stat().st_size / 1e6, 'ratio': seconds / base, 'same': same})
    return rows


def main() -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path, metavar='MODEL.onnx')
    parser.add_argument('--images', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--out', type=Path, help='JSON to write')
    args = parser.parse_args()
    images = sorted(x for x in args.images.iterdir() if x.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    rows = measure(args.file, images)
    for row in rows:
        tail = row.get('failed') or f'{row["mb"]:.1f} MB, time {row["ratio"]:.2f}, {row["same"]}'
        print(f'{row["file"]}: {tail}')
    if args.out:
        args.out.write_text(json.dumps({'machine': machine(), 'images': len(images), 'rows': rows}, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
