"""What a user can get wrong ends in one message that names it, and leaves no file."""

from pathlib import Path

import pytest
import torch

from mila_mm import cli
from mila_mm.cli import export as command
from mila_mm.export import api
from mila_mm.export.formats import FORMATS, Format


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the command and check that it ends with one message that holds the words, and no file."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, words):
        assert cli.execute(command.main, [str(word) for word in argv]) == cli.EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert message.startswith('error: ') and 'Traceback' not in message
        for word in words:
            assert word in message
        assert list(Path.cwd().iterdir()) == []

    return run


def test_a_checkpoint_of_another_model(ready, refused):
    mine, other = ready('retinanet'), ready('upernet')
    refused(
        mine.config, other.checkpoint, '--size', 96, 128, '--format', 'pt2', words=['does not fit', 'missing', '.pth']
    )


def test_a_checkpoint_that_does_not_exist(ready, refused):
    made = ready('retinanet')
    refused(made.config, 'no.pth', '--size', 96, 128, '--format', 'pt2', words=['no.pth', 'does not exist'])


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--size', '16', '128'], ['--size', 'from 32', '16 x 128']),
        (['--size', '32', '128', '--dynamic'], ['--size', 'from 64', '32 x 128']),
        (['--size', '100', '128', '--dynamic'], ['multiples of 32', '100 x 128']),
        (['--size', '99999', '128'], ['--size', '16384', '99999 x 128']),
        (['--size', '96', '128', '--batch', '0'], ['--batch', '1 to 64']),
        (['--size', '96', '128', '--out', 'model.onnx'], ['model.onnx', '.pt2']),
        (['--size', '96', '128', '--images', 'nowhere'], ['--images nowhere', 'does not exist']),
        (['--size', '96'], ['--size', 'expected 2 arguments']),
        (['--size', '96', '128', '--format', 'tensorrt'], ['--format', 'tensorrt']),
    ],
)
def test_flags(ready, refused, flags, words):
    made = ready('retinanet')
    refused(
        made.config, made.checkpoint, *(['--format', 'pt2'] if '--format' not in flags else []), *flags, words=words
    )


@pytest.mark.parametrize(
    ('name', 'change', 'words'),
    [
        ('retinanet', 'model.test_cfg.nms.type=soft_nms', ['RetinaHead', 'soft_nms']),
        ('retinanet', 'model.test_cfg.nms_pre=-1', ['RetinaHead', 'nms_pre']),
        ('mask_rcnn', 'model.test_cfg.rcnn.nms.type=soft_nms', ['roi_head', 'soft_nms']),
        ('mask_rcnn', 'model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max', ['SingleRoIExtractor', 'max']),
    ],
)
def test_settings_without_an_exported_form(ready, refused, name, change, words):
    made = ready(name)
    refused(made.config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', '--cfg-options', change, words=words)


def test_a_model_without_an_exported_form():
    from mila_mm.errors import UserError
    from mila_mm.export.deployed import Deployed

    with pytest.raises(UserError, match='Linear has no exported form'):
        Deployed(torch.nn.Linear(2, 2))


def test_a_package_that_is_missing_is_said_in_one_line(ready, refused, monkeypatch):
    made = ready('retinanet')
    without = Format('.onnx', ('onnx', 'no_such_package'), FORMATS['onnx'].write, FORMATS['onnx'].load)
    monkeypatch.setitem(FORMATS, 'onnx', without)
    refused(made.config, made.checkpoint, '--size', 96, 128, words=['no_such_package', 'mila-mm[export]'])


def test_a_file_that_differs_is_not_kept(ready, refused, monkeypatch):
    made = ready('retinanet')

    def write(path, *_):
        path.write_bytes(b'written')

    def load(path, model, threads):
        assert path.read_bytes() == b'written'

        def run(inputs):
            with torch.no_grad():
                results = model(*(torch.from_numpy(inputs[name]) for name in model.input_names))
            named = {name: x.numpy() for name, x in zip(model.output_names, results, strict=True)}
            return {**named, 'boxes': named['boxes'] + 3}

        return run

    monkeypatch.setitem(FORMATS, 'pt2', Format('.pt2', (), write, load))
    refused(
        made.config,
        made.checkpoint,
        *('--size', 96, 128, '--format', 'pt2', '--images', made.images),
        words=['differs from the model at 96 x 128', 'not kept', 'no partner'],
    )


def test_a_file_that_was_there_stays_as_it_was(ready, tmp_path, monkeypatch):
    from mila_mm.errors import UserError

    made = ready('retinanet')
    old = tmp_path / 'model.pt2'
    old.write_bytes(b'old')
    monkeypatch.setattr(api, 'compare', lambda *args: args[-1].faults.append('a fault'))
    monkeypatch.setitem(FORMATS, 'pt2', Format('.pt2', (), lambda path, *_: path.write_bytes(b'new'), lambda *_: dict))
    with pytest.raises(UserError, match='a fault'):
        api.export_model(made.config, made.checkpoint, format='pt2', size=(96, 128), out=str(old))
    assert old.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [old]
