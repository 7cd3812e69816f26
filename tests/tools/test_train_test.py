"""tools/train.py and tools/test.py on sound input."""

import json
import pickle
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mila_mm import cli

TRAIN, TEST = 'train.py', 'test.py'

BOX_DETECTOR = """
model['type'] = 'FasterRCNN'
model['roi_head'].update(mask_head=None, mask_roi_extractor=None)
val_evaluator['metric'] = 'bbox'
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=5))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(s, s), keep_ratio=True) for s in (64, 96)],
        [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
        [dict(type='LoadAnnotations', with_bbox=True)],
        [dict(type='PackDetInputs', meta_keys=(*meta, 'flip', 'flip_direction'))],
    ]),
]
"""


def scalars(work_dir: Path) -> list[dict]:
    """Return the records of the newest run's JSON log."""
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in log.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)['state_dict']


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'analysis_tools/get_flops.py'])
def test_help_is_quick(script, workspace, tool) -> None:
    start = time.perf_counter()
    ended = script(tool, '--help', cwd=workspace)
    assert ended.status == 0
    assert '--cfg-options' in ended.out
    assert not ended.err
    assert time.perf_counter() - start < 5


class TestTrain:
    def test_detector(self, command, detector, workspace) -> None:
        ended = command(TRAIN, detector, '--tensorboard')
        assert ended.status == 0
        work_dir = workspace / 'work_dirs/detector'
        assert {'epoch_1.pth', 'last_checkpoint', 'detector.py'} <= {path.name for path in work_dir.iterdir()}
        records = scalars(work_dir)
        assert np.isfinite([record['loss'] for record in records if 'loss' in record]).all()
        assert {'coco/bbox_mAP', 'coco/segm_mAP_50'} <= records[-1].keys()
        assert 'eta: ' in ended.out
        assert 'loss_mask: ' in ended.out
        assert list(work_dir.glob('*/vis_data/events.out.tfevents.*'))

    def test_segmentor(self, command, segmentor, workspace) -> None:
        ended = command(TRAIN, segmentor, '--work-dir', 'run')
        assert ended.status == 0
        assert (workspace / 'run/iter_2.pth').is_file()
        assert not (workspace / 'work_dirs').exists()
        assert not list(workspace.rglob('events.out.*'))
        records = scalars(workspace / 'run')
        # fewer iterations than the logging interval still print their losses
        assert [record['step'] for record in records if 'loss' in record] == [1, 2]
        assert 'mIoU' in records[-1]
        assert 'decode.loss_ce: ' in ended.out

    def test_same_seed_gives_the_same_weights(self, command, segmentor, workspace) -> None:
        for run in ('a', 'b'):
            assert command(TRAIN, segmentor, '--work-dir', run).status == 0
        first, second = (weights(workspace / run / 'iter_2.pth') for run in ('a', 'b'))
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_resume_continues_where_it_stopped(self, command, segmentor, workspace) -> None:
        longer = ['--cfg-options', 'train_cfg.max_iters=4']
        assert command(TRAIN, segmentor, '--work-dir', 'run').status == 0
        ended = command(TRAIN, segmentor, '--work-dir', 'run', '--resume', *longer)
        assert ended.status == 0
        # Not from the folder of the log: mmengine names it by the second, and the first run may share it.
        assert re.findall(r'Iter\(train\) \[(\d)/4\]', ended.out) == ['3', '4']
        ended = command(TRAIN, segmentor, '--work-dir', 'other', '--resume', 'run/iter_2.pth', *longer)
        assert ended.status == 0
        assert [record['step'] for record in scalars(workspace / 'other') if 'loss' in record] == [3, 4]

    def test_resume_without_a_checkpoint_starts_anew(self, command, segmentor, workspace) -> None:
        assert command(TRAIN, segmentor, '--work-dir', 'run', '--resume').status == 0
        assert [record['step'] for record in scalars(workspace / 'run') if 'loss' in record] == [1, 2]

    def test_load_from_takes_what_fits_on_request(self, command, segmentor, trained_segmentor, workspace) -> None:
        options = [f'load_from={trained_segmentor}', 'model.auxiliary_head.num_classes=9', 'train_cfg.max_iters=1']
        options = ['--no-check', '--cfg-options', *options]
        assert command(TRAIN, segmentor, *options).status == cli.EXIT_USER_ERROR
        assert command(TRAIN, segmentor, *options, 'load_strict=False').status == 0

    def test_auto_scale_lr(self, command, detector, workspace) -> None:
        options = ['--cfg-options', 'auto_scale_lr.base_batch_size=4', 'optim_wrapper.optimizer.lr=0.4']
        assert command(TRAIN, detector, '--auto-scale-lr', *options, 'param_scheduler=[]').status == 0
        rates = [record['lr'] for record in scalars(workspace / 'work_dirs/detector') if 'lr' in record]
        assert rates == pytest.approx([0.2, 0.2])

    def test_config_of_the_installed_package(self, command, refused, workspace) -> None:
        ended = command(TRAIN, 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512')
        refused(ended, 'data/ade/ADEChallengeData2016')

    def test_a_bad_image_later_on_keeps_what_was_written(self, command, refused, detector, workspace, shapes) -> None:
        # held-out images are first read after the first epoch
        option = 'val_dataloader.dataset.data_prefix.img=annotations'
        options = ['--cfg-options', option, 'default_hooks.checkpoint.interval=1']
        refused(command(TRAIN, detector, *options), 'image', str(shapes / 'annotations'), lines=(1, 2, 3))
        assert not (workspace / 'work_dirs').exists()
        ended = command(TRAIN, detector, '--no-check', *options)
        refused(ended, 'image', str(shapes / 'annotations'))
        assert (workspace / 'work_dirs/detector/epoch_1.pth').is_file()


class TestTest:
    def test_detector(self, command, detector, trained_detector, workspace) -> None:
        ended = command(TEST, detector, trained_detector, '--out', 'predictions.pkl', '--show-dir', 'pictures')
        assert ended.status == 0
        assert 'coco/bbox_mAP' in ended.out
        predictions = pickle.loads((workspace / 'predictions.pkl').read_bytes())
        assert [Path(one['img_path']).name for one in predictions] == ['1000000.png', '1000001.png']
        found = predictions[0]['pred_instances']
        assert found['bboxes'].shape == (len(found['labels']), 4)
        assert len(found['masks']) == len(found['labels'])
        for name in ('1000000.png', '1000001.png'):
            # prediction beside ground truth
            assert cv2.imread(str(workspace / 'pictures' / name)).shape == (64, 128, 3)

    def test_segmentor(self, command, segmentor, trained_segmentor, workspace) -> None:
        ended = command(TEST, segmentor, trained_segmentor, '--out', 'predictions.pkl', '--show-dir', 'pictures')
        assert ended.status == 0
        assert 'mIoU' in ended.out
        predictions = pickle.loads((workspace / 'predictions.pkl').read_bytes())
        assert predictions[0]['pred_sem_seg']['data'].shape == (1, 64, 64)
        assert 'seg_logits' not in predictions[0]
        assert len(list((workspace / 'pictures').glob('*.png'))) == 2

    def test_label_maps_as_png(self, command, segmentor, trained_segmentor, workspace) -> None:
        assert command(TEST, segmentor, trained_segmentor, '--out', 'maps').status == 0
        labels = cv2.imread(str(workspace / 'maps/1000000.png'), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (64, 64)
        assert labels.max() <= 7

    def test_tta_of_a_segmentor(self, command, segmentor, trained_segmentor, workspace) -> None:
        plain = command(TEST, segmentor, trained_segmentor, '--out', 'plain.pkl')
        ended = command(TEST, segmentor, trained_segmentor, '--tta', '--out', 'tta.pkl', '--show-dir', 'pictures')
        assert (plain.status, ended.status) == (0, 0)
        assert 'mIoU' in ended.out
        maps = [pickle.loads(Path(name).read_bytes())[0]['pred_sem_seg']['data'] for name in ('plain.pkl', 'tta.pkl')]
        assert maps[0].shape == maps[1].shape
        assert not torch.equal(*maps)
        assert len(list((workspace / 'pictures').glob('*.png'))) == 2

    def test_tta_of_a_detector(self, command, detector, workspace) -> None:
        detector.write_text(detector.read_text() + BOX_DETECTOR)
        assert command(TRAIN, detector, '--work-dir', 'run').status == 0
        ended = command(TEST, detector, 'run/epoch_1.pth', '--tta', '--out', 'tta.pkl')
        assert ended.status == 0
        assert 'coco/bbox_mAP' in ended.out
        assert len(pickle.loads((workspace / 'tta.pkl').read_bytes())) == 2

    def test_needs_no_training_data(self, command, detector, trained_detector) -> None:
        option = 'train_dataloader.dataset.data_root=data/nowhere'
        assert command(TEST, detector, trained_detector, '--cfg-options', option).status == 0

    def test_takes_what_fits_on_request(self, command, detector, trained_detector) -> None:
        options = [f'model.roi_head.{head}.num_classes=3' for head in ('bbox_head', 'mask_head')]
        assert (
            command(
                TEST, detector, trained_detector, '--no-check', '--cfg-options', *options, 'load_strict=False'
            ).status
            == 0
        )

    def test_same_name_in_two_folders_gives_two_pictures(
        self, command, detector, trained_detector, workspace, shapes
    ) -> None:
        for folder in ('a', 'b'):
            (workspace / 'data/images' / folder).mkdir(parents=True)
            image = cv2.imread(str(next((shapes / 'images/validation').iterdir())))
            cv2.imwrite(str(workspace / 'data/images' / folder / 'same.png'), image)
        content = json.loads((shapes / 'annotations/instances_val.json').read_text())
        for image, folder in zip(content['images'], ('a', 'b'), strict=True):
            image['file_name'] = f'{folder}/same.png'
        (workspace / 'data/instances.json').write_text(json.dumps(content))
        options = ['ann_file=instances.json', 'data_prefix.img=images', 'data_root=data']
        options = [f'test_dataloader.dataset.{option}' for option in options]
        options.append('test_evaluator.ann_file=data/instances.json')
        argv = ['--show-dir', 'pictures', '--cfg-options', *options]
        assert command(TEST, detector, trained_detector, *argv).status == 0
        assert {path.name for path in (workspace / 'pictures').iterdir()} == {'same.png', 'b_same.png'}


def test_as_a_user_runs_them(script, segmentor, workspace) -> None:
    ended = script(TRAIN, segmentor, cwd=workspace)
    assert ended.status == 0, ended.err
    assert not ended.err, 'noise that would bury a message'
    ended = script(TEST, segmentor, 'work_dirs/segmentor/iter_2.pth', cwd=workspace)
    assert ended.status == 0, ended.err
    assert 'mIoU' in ended.out


def test_dist_scripts_from_another_folder(script, segmentor, workspace, tmp_path) -> None:
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    run = workspace / 'run'
    ended = script('dist_train.sh', segmentor, 2, '--work-dir', run, cwd=elsewhere)
    assert ended.status == 0, ended
    assert ' images each in 2 processes' in ended.out
    ended = script('dist_test.sh', segmentor, run / 'iter_2.pth', 2, '--work-dir', run, cwd=elsewhere)
    assert ended.status == 0, ended
    assert 'mIoU' in ended.out


@pytest.mark.parametrize(
    'argv',
    [
        ('dist_train.sh', 'config.py'),
        ('dist_test.sh', 'config.py', 'x.pth'),
        ('slurm_train.sh', 'partition', 'job'),
        ('dist_train.sh', 'config.py', 'two'),
    ],
)
def test_launch_scripts_explain_themselves(script, workspace, argv) -> None:
    ended = script(*argv, cwd=workspace)
    assert ended.status == cli.EXIT_USER_ERROR
    assert argv[0] in ended.err or 'GPUS' in ended.err


def test_slurm_script_hands_the_job_to_srun(script, workspace) -> None:
    (workspace / 'bin').mkdir()
    fake = workspace / 'bin/srun'
    fake.write_text('#!/bin/sh\necho "$MASTER_PORT" "$@"\n')
    fake.chmod(0o755)
    path = f'{workspace / "bin"}:/usr/bin:/bin'
    env = {'PATH': path, 'GPUS': '4', 'SRUN_ARGS': '--time=1 --qos=low'}
    ended = script('slurm_train.sh', 'gpu', 'job', 'c.py', 'out', '--resume', cwd=workspace, env=env)
    assert ended.status == 0
    port, *words = ended.out.split()
    assert 20000 <= int(port) < 30000
    text = ' '.join(words)
    assert '-p gpu --job-name=job --gres=gpu:4 --ntasks=4 --ntasks-per-node=4' in text
    assert '--time=1 --qos=low' in text
    assert text.endswith('train.py c.py --work-dir out --resume --launcher slurm')
