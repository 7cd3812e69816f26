"""What a user may get wrong: two lines that say what to do, exit status 2, and nothing left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TRAIN, TEST, FLOPS = 'train.py', 'test.py', 'analysis_tools/get_flops.py'


@pytest.fixture(autouse=True)
def nothing_left_behind(workspace: Path):
    """Every test of this file must leave the current folder as it prepared it."""
    marker = workspace.parent / 'before'
    yield
    before = set(marker.read_text().splitlines()) if marker.exists() else set()
    after = {str(path.relative_to(workspace)) for path in workspace.rglob('*')}
    assert not {path for path in after - before if 'work_dirs' in path or 'run' in path}, after


@pytest.fixture
def broken_data(workspace: Path, shapes: Path) -> Path:
    """A copy of the shapes set for a test to damage."""
    return Path(shutil.copytree(shapes, workspace.parent / 'broken'))


@pytest.fixture
def detector_on(workspace: Path, write_config: Callable[..., Path], request: pytest.FixtureRequest):
    """Write the detector's config for another data folder."""
    text = request.getfixturevalue('detector').read_text()
    header, _, body = text.partition('ROOT = ')

    def write(data: Path) -> Path:
        path = workspace / 'detector_on.py'
        path.write_text(f'{header}ROOT = {str(data)!r}\n{body.partition(chr(10))[2]}')
        return path

    return write


class TestConfig:
    def test_missing(self, command, refused, workspace) -> None:
        refused(command(TRAIN, 'configs/nowhere.py'), 'configs/nowhere.py', 'does not exist')

    def test_missing_suggests_a_close_name(self, command, refused, detector) -> None:
        refused(command(TRAIN, 'detecter.py'), 'did you mean detector.py?')

    def test_folder(self, command, refused, workspace) -> None:
        refused(command(TRAIN, '.'), 'is a folder')

    @pytest.mark.parametrize('name', ['mmdet::nonexistent', 'mmseg::upernet/nonexistent.py'])
    def test_missing_in_package(self, command, refused, workspace, name) -> None:
        refused(command(TRAIN, name), name, 'does not exist')

    def test_unknown_package(self, command, refused, workspace) -> None:
        refused(command(TRAIN, 'mmfoo::x/y.py'), 'mmfoo', 'mmdet, mmseg')

    def test_syntax_error(self, command, refused, workspace) -> None:
        Path('broken.py').write_text('model = dict(type=\n')
        refused(command(TRAIN, 'broken.py'), 'broken.py', 'SyntaxError')

    def test_error_when_run(self, command, refused, workspace) -> None:
        Path('broken.py').write_text('model = dict(type=undefined_name)\n')
        refused(command(TRAIN, 'broken.py'), 'broken.py', 'undefined_name')

    def test_missing_base(self, command, refused, workspace) -> None:
        Path('child.py').write_text("_base_ = 'parent.py'\n")
        refused(command(TRAIN, 'child.py'), 'child.py', 'parent.py')

    def test_fragment(self, command, refused, workspace) -> None:
        Path('schedule.py').write_text('train_cfg = dict(max_epochs=1)\n')
        refused(command(TRAIN, 'schedule.py'), 'no model')

    def test_no_scope(self, command, refused, workspace) -> None:
        Path('plain.py').write_text("model = dict(type='MaskRCNN')\n")
        refused(command(TRAIN, 'plain.py'), 'default_scope')

    def test_nothing_to_train_with(self, command, refused, workspace) -> None:
        Path('model_only.py').write_text("default_scope = 'mmdet'\nmodel = dict(type='MaskRCNN')\n")
        refused(command(TRAIN, 'model_only.py'), 'train_dataloader')

    def test_nothing_to_test_on(self, command, refused, trained_detector, workspace) -> None:
        Path('model_only.py').write_text("default_scope = 'mmdet'\nmodel = dict(type='MaskRCNN')\n")
        refused(command(TEST, 'model_only.py', trained_detector), 'test_dataloader')

    def test_unknown_type(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'model.neck.type=FPM'), 'FPM', 'registry')

    def test_unknown_argument_of_a_type(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'model.backbone.depth=50'), 'depth')

    def test_missing_pretrained_file(self, command, refused, detector) -> None:
        options = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=nowhere.pth']
        refused(command(TRAIN, detector, '--cfg-options', *options), 'model.backbone.init_cfg', 'nowhere.pth')


class TestCommandLine:
    def test_unknown_flag(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--wrok-dir', 'x'), '--wrok-dir', '--help')

    def test_no_config(self, command, refused, workspace) -> None:
        refused(command(TRAIN), 'CONFIG')

    @pytest.mark.parametrize('option', ['train_cfg.max_epochs', '=3'])
    def test_cfg_option_without_value(self, command, refused, detector, option) -> None:
        refused(command(TRAIN, detector, '--cfg-options', option), 'KEY=VALUE', option)

    def test_cfg_option_with_open_bracket(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'train_cfg.max_epochs=(1'), 'brackets')

    def test_cfg_option_that_nothing_reads(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'trian_cfg.max_epochs=1'), "did you mean 'train_cfg'?")

    def test_cfg_option_beyond_a_list(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'param_scheduler.7.begin=1'), 'param_scheduler.7.begin')

    def test_cfg_option_unknown_to_the_loop(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--cfg-options', 'train_cfg.max_epoch=1'), 'max_epoch')

    @pytest.mark.skipif(torch.cuda.is_available(), reason='mixed precision works with a GPU')
    def test_amp_without_gpu(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--amp-dtype', 'fp16'), '--amp-dtype fp16', 'GPU', 'bf16')
        option = 'optim_wrapper.type=AmpOptimWrapper'
        refused(command(TRAIN, detector, '--cfg-options', option), 'AmpOptimWrapper', 'GPU', '--amp-dtype bf16')

    def test_amp_with_another_wrapper(self, command, refused, detector) -> None:
        option = 'optim_wrapper.type=DeepSpeedOptimWrapper'
        refused(command(TRAIN, detector, '--amp', '--cfg-options', option), 'DeepSpeedOptimWrapper')

    def test_auto_scale_lr_without_a_base(self, command, refused, segmentor) -> None:
        refused(command(TRAIN, segmentor, '--auto-scale-lr'), 'base_batch_size')

    @pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
    def test_launcher_that_did_not_launch(self, command, refused, detector, monkeypatch, launcher) -> None:
        for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
            monkeypatch.delenv(name, raising=False)
        refused(command(TRAIN, detector, '--launcher', launcher), f'--launcher {launcher}')

    def test_work_dir_below_a_file(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--work-dir', 'detector.py/run'), 'is a file')

    @pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs a folder that not even root can write to')
    @pytest.mark.parametrize('name', ['nowhere', 'itself', 'n' * 300, 'n/' * 3000, 'ä' * 200])
    def test_work_dir_that_can_be_none(self, command, refused, detector, workspace, name) -> None:
        (workspace / 'nowhere').symlink_to('not there')
        (workspace / 'itself').symlink_to('itself')
        refused(command(TRAIN, detector, '--work-dir', f'{name}/run'), '--work-dir')

    def test_work_dir_not_writable(self, command, refused, detector) -> None:
        refused(command(TRAIN, detector, '--work-dir', '/proc/mila_mm_run'), '/proc/mila_mm_run', 'cannot write')

    def test_tta_without_tta(self, command, refused, detector, trained_detector) -> None:
        refused(command(TEST, detector, trained_detector, '--tta'), '--tta', 'tta_model')

    def test_tta_of_masks(self, command, refused, detector, trained_detector) -> None:
        with detector.open('a') as file:
            file.write("tta_model = dict(type='DetTTAModel')\ntta_pipeline = [dict(type='LoadImageFromFile')]\n")
        refused(command(TEST, detector, trained_detector, '--tta'), 'masks')

    @pytest.mark.parametrize('out', ['predictions.json', '.'])
    def test_out_of_another_kind(self, command, refused, detector, trained_detector, out) -> None:
        refused(command(TEST, detector, trained_detector, '--out', out), '--out', '.pkl')

    def test_show_without_display(self, command, refused, detector, trained_detector, monkeypatch) -> None:
        monkeypatch.delenv('DISPLAY', raising=False)
        monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
        refused(command(TEST, detector, trained_detector, '--show'), '--show-dir')

    @pytest.mark.parametrize('shape', [('0', '32'), ('8', '8', '8'), ('wide',)])
    def test_flops_of_no_image(self, command, refused, detector, shape) -> None:
        refused(command(FLOPS, detector, '--shape', *shape), '--shape')


class TestArch:
    @pytest.mark.parametrize(
        ('options', 'words'),
        [
            (['arch=huge'], ['huge', 'tiny']),
            (['arch.embed_dim=32', 'arch.depths=[1,1,1,1]', 'arch.num_heads=[3,3,3,3]'], ['num_heads', '3']),
            (['arch.embed_dim=30', 'arch.depths=[1,1,1,1]', 'arch.num_heads=[1,1,1,1]'], ['multiple of 4', '30']),
            (['out_indices=[0,9]'], ['out_indices']),
        ],
        ids=['unknown', 'heads', 'width', 'out_indices'],
    )
    @pytest.mark.parametrize('tool', [TRAIN, FLOPS])
    def test_refused(self, command, refused, detector, tool, options, words) -> None:
        text = detector.read_text()
        if options[0].startswith('arch.'):
            detector.write_text(text.replace("arch='nano'", 'arch=dict()'))
        ended = command(tool, detector, '--cfg-options', *(f'model.backbone.{option}' for option in options))
        refused(ended, 'model', *words)


class TestData:
    def test_missing_folder_of_a_coco_config(self, command, refused, detector_on) -> None:
        ended = command(TRAIN, detector_on(Path('data/nowhere')))
        refused(ended, 'data/nowhere', 'https://cocodataset.org', 'instances_{train,val}2017.json', 'make demo')

    def test_missing_folder_of_an_ade20k_config(self, command, refused, workspace) -> None:
        Path('ade.py').write_text("_base_ = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'\n")
        refused(command(TRAIN, 'ade.py'), 'data/ade', 'ADEChallengeData2016.zip', 'make demo')

    def test_missing_annotation_file(self, command, refused, detector_on, broken_data) -> None:
        (broken_data / 'annotations/instances_train.json').unlink()
        refused(command(TRAIN, detector_on(broken_data)), 'annotation file', 'instances_train.json')

    def test_missing_annotations_of_the_metric(self, command, refused, detector) -> None:
        ended = command(TRAIN, detector, '--cfg-options', 'val_evaluator.ann_file=nowhere.json')
        refused(ended, 'val_evaluator.ann_file', 'nowhere.json')

    def test_missing_label_folder(self, command, refused, segmentor) -> None:
        option = 'train_dataloader.dataset.data_prefix.seg_map_path=labels'
        refused(command(TRAIN, segmentor, '--cfg-options', option), 'seg_map_path', 'labels')

    def test_missing_test_data(self, command, refused, detector, trained_detector) -> None:
        option = 'test_dataloader.dataset.data_root=data/nowhere'
        refused(command(TEST, detector, trained_detector, '--cfg-options', option), 'test_dataloader', 'data/nowhere')

    @pytest.mark.parametrize(
        ('content', 'word'),
        [
            ('{"images": [{"id": 1,', 'not valid JSON'),
            ('', 'is empty (0 bytes)'),
            ('[]', 'expected an object'),
            ('{"images": [], "categories": []}', "'annotations'"),
            ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "'file_name'"),
        ],
        ids=['cut', 'empty', 'list', 'section', 'field'],
    )
    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_broken_annotations(self, command, refused, detector_on, broken_data, content, word, split) -> None:
        path = broken_data / f'annotations/instances_{split}.json'
        path.write_text(content)
        refused(command(TRAIN, detector_on(broken_data)), str(path), word)

    @pytest.mark.parametrize('serialize', [False, True])
    def test_no_annotation_of_the_classes(self, command, refused, detector_on, broken_data, serialize) -> None:
        path = broken_data / 'annotations/instances_train.json'
        content = json.loads(path.read_text())
        for category in content['categories']:
            category['name'] += '_other'
        path.write_text(json.dumps(content))
        option = f'train_dataloader.dataset.serialize_data={serialize}'
        ended = command(TRAIN, detector_on(broken_data), '--cfg-options', option)
        refused(ended, 'classes', 'no category', 'circle_other')

    @pytest.mark.parametrize('workers', [0, 1])
    @pytest.mark.parametrize('content', [b'not an image', b'', None], ids=['garbage', 'empty', 'missing'])
    def test_unreadable_image(self, command, refused, detector_on, broken_data, content, workers) -> None:
        for path in (broken_data / 'images/training').iterdir():
            path.unlink() if content is None else path.write_bytes(content)
        option = f'train_dataloader.num_workers={workers}'
        ended = command(TRAIN, detector_on(broken_data), '--cfg-options', option)
        refused(ended, 'image', str(broken_data / 'images/training'))

    def test_unreadable_test_image(self, command, refused, detector_on, broken_data, trained_detector) -> None:
        for path in (broken_data / 'images/validation').iterdir():
            path.write_bytes(b'not an image')
        refused(command(TEST, detector_on(broken_data), trained_detector), 'image', 'cannot be decoded')

    def test_unreadable_label_map(self, command, refused, workspace, broken_data, segmentor, shapes) -> None:
        for path in (broken_data / 'annotations/training').iterdir():
            path.write_bytes(b'not an image')
        segmentor.write_text(segmentor.read_text().replace(str(shapes), str(broken_data)))
        refused(command(TRAIN, segmentor), 'label map', 'cannot be decoded')


class TestCheckpoint:
    def test_missing(self, command, refused, detector) -> None:
        refused(command(TEST, detector, 'nowhere.pth'), 'nowhere.pth', 'does not exist')

    def test_folder(self, command, refused, detector) -> None:
        refused(command(TEST, detector, '.'), 'is a folder')

    @pytest.mark.parametrize('flag', ['--resume', 'load_from'])
    def test_missing_in_training(self, command, refused, detector, flag) -> None:
        argv = [flag, 'nowhere.pth'] if flag == '--resume' else ['--cfg-options', 'load_from=nowhere.pth']
        refused(command(TRAIN, detector, *argv), flag, 'nowhere.pth')

    @pytest.mark.parametrize(
        'content',
        [b'', b'garbage' * 40, b'<!DOCTYPE html><html></html>', 'cut'],
        ids=['empty', 'garbage', 'html', 'cut'],
    )
    def test_not_one(self, command, refused, detector, trained_detector, content) -> None:
        content = trained_detector.read_bytes()[:5000] if content == 'cut' else content
        path = detector.parent.parent / 'bad.pth'
        path.write_bytes(content)
        refused(command(TEST, detector, path), str(path))

    def test_with_code(self, command, refused, detector, tmp_path) -> None:
        class Touch:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'executed'),)

        torch.save({'state_dict': {}, 'meta': Touch()}, tmp_path / 'evil.pth')
        refused(command(TEST, detector, tmp_path / 'evil.pth'), 'evil.pth')
        assert not (tmp_path / 'executed').exists()

    def test_of_another_arch(self, command, refused, detector, trained_detector) -> None:
        detector.write_text(
            detector.read_text().replace(
                "arch='nano'", 'arch=dict(embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])'
            )
        )
        refused(command(TEST, detector, trained_detector), str(trained_detector), 'unexpected', 'backbone.layers.2')

    def test_of_other_classes(self, command, refused, detector, trained_detector) -> None:
        option = 'model.roi_head.bbox_head.num_classes=3'
        ended = command(TEST, detector, trained_detector, '--no-check', '--cfg-options', option)
        refused(ended, 'of another shape', 'roi_head.bbox_head.fc_cls', 'load_strict=False')

    def test_of_another_task(self, command, refused, detector, trained_segmentor) -> None:
        refused(command(TEST, detector, trained_segmentor), 'missing', 'unexpected')

    def test_of_another_model_in_training(self, command, refused, detector, trained_segmentor) -> None:
        refused(command(TRAIN, detector, '--resume', trained_segmentor), 'missing', 'unexpected')

    def test_resume_from_weights_alone(self, command, refused, detector, trained_detector, tmp_path) -> None:
        weights = torch.load(trained_detector, weights_only=False)['state_dict']
        torch.save({'state_dict': weights}, tmp_path / 'weights.pth')
        refused(command(TRAIN, detector, '--resume', tmp_path / 'weights.pth'), '--resume', 'load_from')


def test_existing_work_dir_is_left_as_it_was(command, refused, detector, trained_segmentor, workspace) -> None:
    (workspace / 'kept').mkdir()
    (workspace / 'kept/detector.py').write_text('# of an earlier run\n')
    refused(command(TRAIN, detector, '--resume', trained_segmentor, '--work-dir', 'kept'))
    assert [path.name for path in (workspace / 'kept').iterdir()] == ['detector.py']
    assert (workspace / 'kept/detector.py').read_text() == '# of an earlier run\n'


def test_a_bug_keeps_its_traceback(command, detector, monkeypatch) -> None:
    from mila_mm.engine import training

    def fail(*_: object) -> None:
        raise RuntimeError('a bug of ours')

    monkeypatch.setattr(training, 'check_data', fail)
    with pytest.raises(RuntimeError, match='a bug of ours'):
        command(TRAIN, detector)
