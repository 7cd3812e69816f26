"""The formats: what each needs, how a file of it is written and run."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mila_mm.errors import UserError
from mila_mm.export.deployed import Deployed, example_inputs
from mila_mm.ops.common import only_plain_operators

METADATA_KEY = 'mila_mm'
METADATA_MARK = b'smallest_side'  # every file has it
# The sides of a file for several sizes are multiples of the last stage's stride: its graph then has short sizes.
STEP = 32
LEAST_STEPS, MOST_STEPS = 2, 512
# What a graph for any size is recorded with. Where a level of a pyramid had one cell, torch would keep that for all
# sizes: these have 3 x 4 cells at 1/128, different numbers, so that none passes for the other.
_EXAMPLE = (320, 448)

Metadata = Mapping[str, Any]
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Which files of it end with.
        every_row: Whether a detector's masks have to be of fixed shape in it. Inductor (torch 2.11) compiles two
            convolutions in a row to wrong numbers where their batch depends on data.
        packages: What writing and checking need beyond torch.
        write: Writes a file from a model, its inputs, whether any size is to do, and metadata; returns what
            :func:`smallest_side` says of it, which is in the file's metadata, too.
        load: Opens a file and returns a function from inputs to results by name.
    """

    suffix: str
    every_row: bool
    packages: tuple[str, ...]
    write: Callable[[Path, Deployed, tuple[Tensor, ...], bool, Metadata], int | None]
    load: Callable[[Path, Deployed, int], Run]


def check_packages(name: str) -> None:
    """Raise UserError, in one line, where what a format needs is not installed."""
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = ' openvino' if 'openvino' in missing else ''
        raise UserError(
            f'--format {name} needs {", ".join(missing)}, not installed: pip install "mila-mm[export]"{extra}'
        )
    compiler = os.environ.get('CXX', 'g++')
    if name == 'aoti' and shutil.which(compiler) is None:
        raise UserError(f'--format aoti compiles with {compiler}, which is not here; --format pt2 needs no compiler')


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes on their own code off the user's screen."""
    names = ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def program(model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool) -> ExportedProgram:
    """Record a model as one graph of PyTorch's own operators, and of torchvision's for boxes.

    Args:
        model: What to export.
        inputs: As of :func:`mila_mm.export.deployed.example_inputs`.
        dynamic: Whether height and width may be any multiples of :data:`STEP`; the batch is that of the inputs, and
            nothing else of them counts.
    """
    shapes = None
    if dynamic:
        inputs = example_inputs(model, inputs[0].shape[0], *_EXAMPLE)
        height, width = (Dim(name, min=LEAST_STEPS, max=MOST_STEPS) for name in ('height', 'width'))
        shapes = ({1: STEP * height, 2: STEP * width}, *([None] * (len(inputs) - 1)))
    with torch.no_grad(), only_plain_operators(), _quiet():
        return torch.export.export(model, inputs, dynamic_shapes=shapes)


def smallest_side(run: Callable[..., Any], model: Deployed, batch: int, dynamic: bool) -> int | None:
    """Find the smallest side of images that a model for any size takes, None of one for a single size.

    Args:
        run: The model, or a graph of it. Torch writes into a graph that each map had more than one cell where it was
            recorded, and checks that in every run.
        model: What is exported.
        batch: Images of one call.
        dynamic: Whether any size is to do.
    """
    if not dynamic:
        return None
    for side in range(LEAST_STEPS * STEP, min(_EXAMPLE), STEP):
        with suppress(AssertionError, RuntimeError, ValueError), torch.no_grad(), _quiet():
            run(*example_inputs(model, batch, side, side))
            return side
    return min(_EXAMPLE)


def check_next_size(run: Callable[..., Any], model: Deployed, batch: int, smallest: int | None) -> None:
    """Refuse a graph for any size that does not take the size after the smallest.

    Of a pool with stride 2 torch keeps whether the map's sides were even.

    Raises:
        UserError: It names both sizes.
    """
    if smallest is None:
        return
    side = smallest + STEP
    try:
        with torch.no_grad(), _quiet():
            run(*example_inputs(model, batch, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f'export: the graph that torch records of this model takes images of {smallest} x {smallest}, and not of '
            f'{side} x {side}; export it without --dynamic, or as onnx'
        ) from error


def _text(metadata: Metadata, smallest: int | None) -> str:
    return json.dumps({**metadata, 'smallest_side': smallest})


def check_pools(recorded: ExportedProgram) -> None:
    """Refuse pools of a size of their own making, which the exporter states for the size of the example alone.

    Modules have been replaced, see :class:`mila_mm.export.pieces.AdaptivePool`; calls of the function are left.

    Raises:
        UserError: It names the module.
    """
    kinds = ('aten.adaptive_avg_pool', 'aten.adaptive_max_pool')
    for node in recorded.graph.nodes:
        if str(node.target).startswith(kinds) and any(side != 1 for side in node.args[1]):
            modules = [kind for _, kind in node.meta.get('nn_module_stack', {}).values()]
            owner = str(modules[-1]).rpartition('.')[2] if modules else 'the model'
            raise UserError(
                f'export: {owner} pools maps to {list(node.args[1])}, which a file for any size gets wrong; '
                'export it without --dynamic'
            )


def _write_onnx(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool, metadata: Metadata
) -> int | None:
    names = {'input_names': list(model.input_names), 'output_names': list(model.output_names)}
    smallest = smallest_side(model, model, len(inputs[0]), dynamic)
    text = _text(metadata, smallest)
    if model.fixed:
        _write_trace(path, model, inputs, text, names)
        return smallest
    recorded = program(model, inputs, dynamic)
    if dynamic:
        check_pools(recorded)
    with _quiet():
        graph = torch.onnx.export(recorded, dynamo=True, verbose=False, **names)
        graph.model.metadata_props[METADATA_KEY] = text
        graph.save(path, external_data=False)
    return smallest


def _write_trace(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], metadata: str, names: dict[str, list[str]]
) -> None:
    """Through a trace, for what torch.export does not take: sizes that mmdet reads from tensors."""
    import onnx

    with torch.no_grad(), _quiet():
        torch.onnx.export(model, inputs, str(path), dynamo=False, opset_version=18, **names)
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, {METADATA_KEY: metadata})
    onnx.save(graph, str(path))


def _load_onnx(path: Path, model: Deployed, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of every constant that it folds away
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda inputs: dict(zip(model.output_names, session.run(None, dict(inputs)), strict=True))


def _write_pt2(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool, metadata: Metadata
) -> int | None:
    content = io.BytesIO()  # torch's writer of archives ends the process where a disk is full
    recorded = program(model, inputs, dynamic)
    with _quiet():
        smallest = smallest_side(recorded.module(), model, len(inputs[0]), dynamic)
        check_next_size(recorded.module(), model, len(inputs[0]), smallest)
        torch.export.save(recorded, content, extra_files={METADATA_KEY: _text(metadata, smallest)})
    path.write_bytes(content.getbuffer())
    return smallest


def _load_pt2(path: Path, model: Deployed, threads: int) -> Run:
    with path.open('rb') as file, _quiet():
        return _tensors_in_and_out(torch.export.load(file).module(), model)


def _write_aoti(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool, metadata: Metadata
) -> int | None:
    from torch._inductor import aoti_compile_and_package

    content = io.BytesIO()
    recorded = program(model, inputs, dynamic)
    with _quiet():
        smallest = smallest_side(recorded.module(), model, len(inputs[0]), dynamic)
        check_next_size(recorded.module(), model, len(inputs[0]), smallest)
        configs = {
            'aot_inductor.metadata': {METADATA_KEY: _text(metadata, smallest)},
            # Of an index under a mask that is one number torch 2.11 writes a check that no compiler takes. Indices here
            # are of topk, nonzero and suppression, which stay inside.
            'assert_indirect_indexing': False,
        }
        aoti_compile_and_package(recorded, package_path=content, inductor_configs=configs)
    path.write_bytes(content.getbuffer())
    return smallest


def _load_aoti(path: Path, model: Deployed, threads: int) -> Run:
    from torch._inductor import aoti_load_package

    return _tensors_in_and_out(aoti_load_package(str(path)), model)


class _Checked(nn.Module):
    """A model to trace: unlike a graph of ONNX a trace takes any images, and does with them what it saw with others.

    Args:
        model: What to trace.
        batch: Images of one call.
        size: Height and width of the images, None for any that the model itself accepts.
    """

    def __init__(self, model: Deployed, batch: int, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.batch, self.size = model, batch, size

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Compute the results; another batch or size ends in an error of ``cat`` or ``reshape``."""
        if self.size is not None:
            image = torch.cat((image, image.new_zeros(0, *self.size, 3)))
        return self.model(image.reshape(self.batch, image.shape[1], image.shape[2], 3), *rest)


def _write_torchscript(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool, metadata: Metadata
) -> int | None:
    batch, height, width = inputs[0].shape[:3]
    smallest = smallest_side(model, model, batch, dynamic)
    checked = _Checked(model, batch, None if dynamic else (height, width))
    with torch.no_grad(), _quiet():
        traced = torch.jit.trace(checked, inputs, check_trace=False)
        with path.open('wb') as file:
            torch.jit.save(traced, file, _extra_files={METADATA_KEY: _text(metadata, smallest)})
    return smallest


def _load_torchscript(path: Path, model: Deployed, threads: int) -> Run:
    with _quiet():
        return _tensors_in_and_out(torch.jit.load(str(path), map_location='cpu'), model)


def _tensors_in_and_out(module: Callable[..., Any], model: Deployed) -> Run:
    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad(), _quiet():
            results = module(*(torch.from_numpy(inputs[name]) for name in model.input_names))
        return {name: x.numpy() for name, x in zip(model.output_names, results, strict=True)}

    return run


def _write_openvino(
    path: Path, model: Deployed, inputs: tuple[Tensor, ...], dynamic: bool, metadata: Metadata
) -> int | None:
    import openvino

    draft = path.with_suffix('.onnx')
    smallest = _write_onnx(draft, model, inputs, dynamic, metadata)
    converted = openvino.convert_model(str(draft))
    if smallest is not None:
        sides = (smallest, MOST_STEPS * STEP)
        converted.reshape({'image': [inputs[0].shape[0], sides, sides, 3]})
    converted.set_rt_info(_text(metadata, smallest), [METADATA_KEY])
    openvino.save_model(converted, str(path), compress_to_fp16=model.half_precision)
    draft.unlink()
    return smallest


def _load_openvino(path: Path, model: Deployed, threads: int) -> Run:
    import openvino

    # With one thread OpenVINO 2026.4 does not raise where shapes do not fit: it returns results of an earlier call.
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': max(threads, 2)}
    compiled = openvino.Core().compile_model(str(path), 'CPU', options)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = compiled(dict(inputs))
        return {name: np.array(results[i]) for i, name in enumerate(model.output_names)}

    return run


FORMATS: dict[str, Format] = {
    'onnx': Format('.onnx', False, ('onnx', 'onnxscript', 'onnxruntime'), _write_onnx, _load_onnx),
    'pt2': Format('.pt2', True, (), _write_pt2, _load_pt2),
    'aoti': Format('.pt2', True, (), _write_aoti, _load_aoti),
    'torchscript': Format('.pt', False, (), _write_torchscript, _load_torchscript),
    'openvino': Format('.xml', False, ('onnx', 'onnxscript', 'openvino'), _write_openvino, _load_openvino),
}
