"""What a user can get wrong ends in one message that names it, and leaves no file."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mila_mm import cli
from mila_mm.cli import export as command
from mila_mm.engine import load_config
from mila_mm.errors import UserError
from mila_mm.export import api
from mila_mm.export.checks import check_out
from mila_mm.export.formats import FORMATS, Format
from mila_mm.export.pipelines import check_pipeline


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


def test_inputs_are_not_overwritten(ready, tmp_path):
    made = ready('retinanet')
    checkpoint = tmp_path / 'model.pt'
    shutil.copy(made.checkpoint, checkpoint)
    weights = checkpoint.rename(tmp_path / 'weights.bin')
    (tmp_path / 'model.pt').symlink_to(weights)
    for format, out in (('torchscript', 'model.pt'), ('openvino', 'weights.xml')):
        with pytest.raises(UserError, match='would overwrite'):
            check_out(made.config, str(weights), str(tmp_path / out), format)
    with pytest.raises(UserError, match=r'weights.bin, which is of something else'):
        check_out(made.config, 'other.pth', str(tmp_path / 'weights.xml'), 'openvino')
    (tmp_path / 'weights.xml').write_text('smallest_side')  # as an exported one has it
    assert check_out(made.config, 'other.pth', str(tmp_path / 'weights.xml'), 'openvino')


@pytest.mark.parametrize('format', ['onnx', 'pt2', 'torchscript', 'openvino'])
def test_what_is_there_is_replaced_only_if_it_is_of_this_command(ready, tmp_path, format):
    """As a training's checkpoint of the same name is not."""
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    made = ready('classifier')
    out = tmp_path / f'model{FORMATS[format].suffix}'
    options = dict(format=format, size=(96, 128), images=[made.images], out=str(out))
    api.export_model(made.config, made.checkpoint, **options)
    before = out.stat().st_ino
    api.export_model(made.config, made.checkpoint, **options)
    assert out.stat().st_ino != before
    for file in tmp_path.iterdir():
        file.unlink()
    shutil.copy(made.checkpoint, out)
    with pytest.raises(UserError, match=f'--out {out}: is there, and not a file of this command; remove it'):
        api.export_model(made.config, made.checkpoint, **options)
    assert out.read_bytes() == Path(made.checkpoint).read_bytes()


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


def test_a_pipeline_that_normalises_is_refused(ready, refused):
    """A file would get other pixels than the model does in a test."""
    made = ready('retinanet')
    step = "test_dataloader.dataset.pipeline.0={'type':'Normalize','mean':[0,0,0],'std':[1,1,1]}"
    argv = [made.config, made.checkpoint, '--size', 96, 128, '--format', 'pt2', '--cfg-options', step]
    refused(*argv, words=['test pipeline', 'Normalize', 'data_preprocessor'])


@pytest.mark.parametrize(
    ('step', 'words'),
    [
        (dict(type='Pad', size=(640, 640), pad_val=dict(img=(114, 114, 114))), 'to 640 x 640 with (114, 114, 114)'),
        (dict(type='Pad', size_divisor=32), 'pads images to multiples of 32 with 0'),
        (dict(type='Pad', pad_to_square=True), 'pads images to squares with 0'),
        (dict(type='LoadImageFromFile', color_type='grayscale'), 'as grayscale'),
        (dict(type='RandomFlip', prob=0.5), 'by chance'),
        (dict(type='RandomFlip', prob=0.0), None),
        (dict(type='EfficientNetCenterCrop', crop_size=224), None),
        (dict(type='Resize', scale=(640, 640), keep_ratio=True), None),
        (dict(type='MyOwn'), 'has MyOwn; the file does not do'),
    ],
)
def test_what_a_pipeline_does_and_a_file_does_not_is_said(step, words):
    pipeline = [dict(type='LoadImageFromFile'), step, dict(type='PackDetInputs')]
    inner = dict(type='CocoDataset', pipeline=[])
    wrapped = dict(type='Outer', dataset=inner, pipeline=pipeline)
    for dataset in (wrapped, dict(datasets=[dict(inner, pipeline=pipeline)])):
        notes = check_pipeline(Config(dict(test_dataloader=dict(dataset=dataset))))
    assert len(notes) == (words is not None) and all(words in note for note in notes)


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


def test_weights_beside_an_empty_file_are_somebody_elses(ready, tmp_path):
    (tmp_path / 'm.xml').touch()
    (tmp_path / 'm.bin').write_bytes(b'weights')
    with pytest.raises(UserError, match=r'm\.bin, which is of something else'):
        check_out('config.py', 'c.pth', str(tmp_path / 'm.xml'), 'openvino')


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
