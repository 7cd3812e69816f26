"""What an export looks at before it writes: what lies at the place of the file, and the config's test pipeline."""

import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from mila_mm.errors import UserError
from mila_mm.export import api
from mila_mm.export.checks import check_out
from mila_mm.export.formats import FORMATS
from mila_mm.export.pipelines import check_pipeline


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


def test_weights_beside_an_empty_file_are_somebody_elses(ready, tmp_path):
    (tmp_path / 'm.xml').touch()
    (tmp_path / 'm.bin').write_bytes(b'weights')
    with pytest.raises(UserError, match=r'm\.bin, which is of something else'):
        check_out('config.py', 'c.pth', str(tmp_path / 'm.xml'), 'openvino')
