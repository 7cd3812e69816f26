"""Reads hostile checkpoints through every function of OpenMMLab's that reads checkpoints, in a process of its own.

``entry_points.py IMPORTS FOLDER``: import these modules in order, then read each file of FOLDER through each entry
point. Prints one JSON object, entry point -> file -> 'refused: ERROR', 'read', or 'EXECUTED'.
"""

import functools
import http.server
import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CANARY = 'executed'


def of_mmengine(address: str) -> Iterator[tuple[str, Callable[[Path], object]]]:
    from mmengine.config import Config
    from mmengine.model import PretrainedInit
    from mmengine.runner import BaseLoop, CheckpointLoader, Runner, checkpoint, load_checkpoint
    from mmengine.utils import dl_utils
    from torch import nn

    yield 'load_checkpoint', lambda path: load_checkpoint(nn.Linear(2, 2), str(path))
    yield '_load_checkpoint', lambda path: checkpoint._load_checkpoint(str(path))
    yield 'CheckpointLoader', lambda path: CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    yield 'with a prefix', lambda path: checkpoint._load_checkpoint_with_prefix('backbone', str(path))
    yield 'load_from_local', lambda path: checkpoint.load_from_local(str(path), 'cpu')
    yield 'over http', lambda path: load_checkpoint(nn.Linear(2, 2), f'{address}/{path.name}')
    yield 'load_url', lambda path: dl_utils.load_url(f'{address}/{path.name}', progress=False)
    yield 'init_cfg', lambda path: PretrainedInit(checkpoint=str(path))(nn.Linear(2, 2))
    if hasattr(checkpoint, '_safe_torch_load'):
        yield '_safe_torch_load', checkpoint._safe_torch_load
        yield '_safe_torch_load of bytes', lambda path: checkpoint._safe_torch_load(io.BytesIO(path.read_bytes()))

    def runner(path: Path) -> Runner:
        cfg = Config(dict(model=dict(type='ToyModel'), work_dir=str(path.parent / 'runs'), experiment_name='x'))
        made = Runner.from_cfg(cfg)
        made.logger.setLevel('CRITICAL')
        return made

    from mmengine.model import BaseModel
    from mmengine.registry import MODELS

    @MODELS.register_module()
    class ToyModel(BaseModel):
        def __init__(self, data_preprocessor: None = None) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, *args: object) -> None: ...

    shared: list[Runner] = []

    def toy_runner(path: Path) -> Runner:
        if not shared:
            shared.append(runner(path))
        return shared[0]

    def resume(path: Path) -> None:
        made = toy_runner(path)

        class Loop(BaseLoop):
            def __init__(self) -> None: ...

            def run(self) -> None: ...

        made._train_loop = Loop()
        try:
            made.resume(str(path), resume_optimizer=False, resume_param_scheduler=False, map_location='cpu')
        except (AttributeError, KeyError):
            return  # a file of weights alone: nothing else to resume from

    yield 'Runner.load_checkpoint', lambda path: toy_runner(path).load_checkpoint(str(path))
    yield 'Runner.resume', resume


def of_the_others() -> Iterator[tuple[str, Callable[[Path], object]]]:
    from mmdet.apis import DetInferencer, init_detector
    from mmengine.config import Config
    from mmseg.apis import MMSegInferencer, init_model

    detector = Config.fromfile(ROOT / 'configs/demo/mask_rcnn_mila_nano_shapes.py')
    segmentor = Config.fromfile(ROOT / 'configs/demo/upernet_mila_nano_shapes.py')
    yield 'DetInferencer', lambda path: DetInferencer(detector, str(path), device='cpu')
    yield 'DetInferencer without a model', lambda path: DetInferencer(weights=str(path), device='cpu')
    yield 'MMSegInferencer', lambda path: MMSegInferencer(segmentor, str(path), device='cpu')
    yield 'MMSegInferencer without a model', lambda path: MMSegInferencer(None, str(path), device='cpu')
    yield 'init_detector', lambda path: init_detector(detector, str(path), device='cpu')
    yield 'init_model', lambda path: init_model(segmentor, str(path), device='cpu')

    def pretrained_part(path: Path) -> None:
        from mmdet.registry import MODELS

        MODELS.build(
            dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint=str(path)), _scope_='mmdet')
        ).init_weights()

    yield 'init_cfg of a backbone', pretrained_part


def of_mmpretrain() -> Iterator[tuple[str, Callable[[Path], object]]]:
    try:
        from mmpretrain import ImageClassificationInferencer, get_model
    except ModuleNotFoundError:
        return
    name = 'resnet18_8xb16_cifar10'
    yield 'mmpretrain.get_model', lambda path: get_model(name, pretrained=str(path))
    yield 'ImageClassificationInferencer', lambda path: ImageClassificationInferencer(name, pretrained=str(path))


def outcome(read: Callable[[Path], object], path: Path) -> str:
    canary = path.parent / CANARY
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            read(path)
        said = 'read'
    except Exception as error:  # noqa: BLE001 - whatever a reader raises is its answer
        said = f'refused: {type(error).__name__}: {error}'
    if canary.exists():
        canary.rmdir()
        return 'EXECUTED'
    return said


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


def main(imports: str, folder: str) -> None:
    for name in imports.split(','):
        import_module(name)
    warnings.simplefilter('ignore')
    os.environ['MILA_HOME'] = os.environ['TORCH_HOME'] = os.path.join(folder, 'cache')
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ways = dict(of_mmengine(f'http://127.0.0.1:{server.server_port}'))
    if imports.startswith('mila_mm'):
        ways |= {**dict(of_the_others()), **dict(of_mmpretrain())}
    files = sorted(Path(folder).glob('*.pth'))
    sys.stdout.write(
        json.dumps({name: {path.stem: outcome(read, path) for path in files} for name, read in ways.items()})
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == '__main__':
    main(*sys.argv[1:])
