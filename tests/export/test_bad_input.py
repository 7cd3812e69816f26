"""What a user can get wrong ends in one message that names it, and leaves no file."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mila_mm.engine import load_config
from mila_mm.errors import UserError
from mila_mm.export import api
from mila_mm.export.formats import FORMATS, Format


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
        (['--size', '-96', '128'], ['--size', 'from 32', '-96 x 128']),
        (['--size', '96', '0'], ['--size', 'from 32', '96 x 0']),
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
        ('retinanet', 'model.test_cfg.max_per_img=-1', ['RetinaHead', 'max_per_img']),
        ('retinanet', 'model.test_cfg.nms={"class_agnostic":True,"split_thr":99}', ['RetinaHead', 'split_thr']),
        ('dino', 'model.test_cfg.max_per_img=-1', ['max_per_img', 'from 1 to 240', '-1']),
        ('mask_rcnn', 'model.test_cfg.rpn.max_per_img=0', ['rpn_head', 'max_per_img']),
        ('mask_rcnn', 'model.test_cfg.rcnn.nms.type=soft_nms', ['roi_head', 'soft_nms']),
        ('mask_rcnn', 'model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max', ['SingleRoIExtractor', 'max']),
    ],
)
def test_settings_without_an_exported_form(ready, refused, name, change, words):
    made = ready(name)
    refused(made.config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', '--cfg-options', change, words=words)


def test_a_model_without_an_exported_form():
    from mila_mm.export.deployed import Deployed

    with pytest.raises(UserError, match='Linear has no exported form'):
        Deployed(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--masks', 'image'], ['--masks image', 'detector without masks']),
        (['--logits'], ['--logits', 'detector']),
        (['--out', '.'], ['--out .', '.pt2']),
        (['--images', 'nowhere.png'], ['--images nowhere.png']),
        (['--cfg-options', 'model.bbox_head.type=NoSuchHead'], ['NoSuchHead']),
        (['--cfg-options', 'model.bbox_head.num_classes=3'], ['does not fit', 'another shape']),
        (['--batch', 'two'], ['--batch', 'two']),
    ],
)
def test_what_the_model_does_not_have(ready, refused, flags, words):
    made = ready('retinanet')
    refused(made.config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', *flags, words=words)


@pytest.mark.parametrize('content', [b'', b'no checkpoint', None], ids=['empty', 'text', 'folder'])
def test_what_is_no_checkpoint(ready, refused, tmp_path_factory, content):
    path = tmp_path_factory.mktemp('given') / 'model.pth'
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    refused(ready('retinanet').config, path, '--size', 96, 128, '--format', 'pt2', words=['model.pth'])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', "config.py has no model with a 'type'"),
        ('model = 3\n', "config.py has no model with a 'type'"),
        ('model = dict(type="x")\n', 'is the config a detector, a segmentor or a classifier?'),
        ('this is no Python', 'config.py cannot be read: SyntaxError'),
    ],
)
def test_a_config_without_a_model(ready, refused, tmp_path_factory, text, message):
    config = tmp_path_factory.mktemp('given') / 'config.py'
    config.write_text(text)
    made = ready('retinanet')
    refused(config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', words=[message])


def writing(monkeypatch, write):
    monkeypatch.setitem(FORMATS, 'pt2', Format('.pt2', True, (), write, FORMATS['pt2'].load))


@pytest.mark.parametrize(
    ('error', 'free', 'words'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), 0, ['cannot be written', 'No space left']),
        (RuntimeError('writer failed'), 0, ['cannot be written', 'disk is full']),
        (RuntimeError('no such operator: cummax'), 1 << 40, ['does not go into --format pt2', 'cummax']),
    ],
)
@pytest.mark.parametrize('out', ['model.pt2', 'new/folder/model.pt2'])
def test_a_writing_that_fails(ready, refused, monkeypatch, error, free, words, out):
    def write(path, *_):
        path.write_bytes(b'half')
        raise error

    writing(monkeypatch, write)
    monkeypatch.setattr('shutil.disk_usage', lambda _: SimpleNamespace(free=free))
    made = ready('retinanet')
    refused(made.config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', '--out', out, words=words)


def test_an_interrupt_leaves_nothing(ready, tmp_path, monkeypatch):
    def write(path, *_):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    writing(monkeypatch, write)
    made = ready('retinanet')
    with pytest.raises(KeyboardInterrupt):
        api.export_model(
            made.config, made.checkpoint, format='pt2', size=(96, 128), out=str(tmp_path / 'new' / 'model.pt2')
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(ready, refused):
    made = ready('retinanet')
    argv = ['--size', 96, 128, '--format', 'pt2', '--out', '/proc/model.pt2']
    refused(made.config, made.checkpoint, *argv, words=['--out /proc', 'cannot write'])


@pytest.mark.parametrize('content', [b'', b'none', 'cut'], ids=['empty', 'text', 'cut'])
def test_a_picture_that_cannot_be_read_is_named_before_anything_is_written(ready, refused, tmp_path_factory, content):
    made = ready('classifier')
    path = tmp_path_factory.mktemp('pictures') / 'broken.png'
    whole = next(Path(made.images).iterdir()).read_bytes()
    path.write_bytes(whole[:40] if content == 'cut' else content)
    argv = [made.config, made.checkpoint, '--size', 96, 128, '--format', 'torchscript', '--images', path]
    refused(*argv, words=[f'--images {path}: cannot be read as an image'])


@pytest.mark.parametrize('flag', ['--out', '--images'])
def test_a_name_that_is_too_long(ready, refused, flag):
    made = ready('classifier')
    argv = [made.config, made.checkpoint, '--size', 96, 128, '--format', 'torchscript']
    refused(*argv, flag, 'x' * 300 + '.pt', words=[flag, 'File name too long'])


def test_weights_that_are_no_numbers(ready, refused, tmp_path_factory):
    made = ready('segformer')
    content = torch.load(made.checkpoint)
    content['state_dict']['decode_head.conv_seg.weight'][0, 0] = float('nan')
    path = tmp_path_factory.mktemp('weights') / 'nan.pth'
    torch.save(content, path)
    refused(
        made.config, path, '--size', 96, 128, '--format', 'pt2', words=[str(path), 'decode_head.conv_seg', 'not finite']
    )


def test_weights_that_are_not_in_the_checkpoint_are_told(ready):
    """Where the config asks for them to be left as they are."""
    made = ready('retinanet')
    content = torch.load(made.checkpoint)
    gone = [key for key in content['state_dict'] if key.startswith('bbox_head.retina_cls')]
    for key in gone:
        del content['state_dict'][key]
    path = Path(made.checkpoint).with_name('without_head.pth')
    torch.save(content, path)
    with pytest.raises(UserError, match='load_strict=False'):
        api.load_model(load_config(made.config), str(path))
    _, notes = api.load_model(load_config(made.config, ['load_strict=False']), str(path))
    assert notes == [f'load_strict=False: {len(gone)} tensors of the model are not in the checkpoint, and random']


def test_a_segmentor_without_a_test_cfg(ready, tmp_path):
    made = ready('segformer')
    options = dict(size=(64, 96), out=str(tmp_path / 'model.pt'), images=[made.images])
    api.export_model(made.config, made.checkpoint, format='torchscript', cfg_options=['model.test_cfg=None'], **options)


def test_a_model_that_fails_on_images_is_told(ready, refused, monkeypatch):
    made = ready('segformer')

    def fail(*_):
        raise ZeroDivisionError('of its own')

    monkeypatch.setattr(api, 'predict', fail)
    argv = [made.config, made.checkpoint, '--size', 64, 96, '--format', 'torchscript']
    refused(*argv, words=['the model does not run on images of 64 x 96', 'ZeroDivisionError: of its own'])


def test_a_package_that_is_missing_is_said_in_one_line(ready, refused, monkeypatch):
    made = ready('retinanet')
    without = Format('.onnx', False, ('onnx', 'no_such_package'), FORMATS['onnx'].write, FORMATS['onnx'].load)
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

    monkeypatch.setitem(FORMATS, 'pt2', Format('.pt2', True, (), write, load))
    refused(
        made.config,
        made.checkpoint,
        *('--size', 96, 128, '--format', 'pt2', '--images', made.images),
        words=['differs from the model at 96 x 128', 'not kept', 'no partner'],
    )


def test_a_file_that_was_there_stays_as_it_was(ready, tmp_path, monkeypatch):
    made = ready('retinanet')
    old = tmp_path / 'model.pt2'
    old.write_bytes(b'old "smallest_side": 64')

    def write(path, *_):
        path.write_bytes(b'new')

    monkeypatch.setattr(api, 'compare', lambda *args: args[-1].faults.append('a fault'))
    monkeypatch.setitem(FORMATS, 'pt2', Format('.pt2', True, (), write, lambda *_: dict))
    with pytest.raises(UserError, match='a fault'):
        api.export_model(made.config, made.checkpoint, format='pt2', size=(96, 128), out=str(old))
    assert old.read_bytes() == b'old "smallest_side": 64'
    assert list(tmp_path.iterdir()) == [old]
