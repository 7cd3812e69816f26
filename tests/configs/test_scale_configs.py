"""The configs of configs/scale: training, prediction and evaluation of a shrunken copy, and their arithmetic."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config

import mila_mm.engine
from mila_mm.datasets.shapes import write_shapes
from mila_mm.engine import load_config
from mila_mm.errors import UserError

SCALE = Path(__file__).resolve().parents[2] / 'configs/scale'
NARROW = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The shapes set under COCO's names, and as Cityscapes."""
    folder = tmp_path_factory.mktemp('data')
    shapes = write_shapes(folder / 'shapes', num_train=2, num_val=2, size=64, seed=0)
    (folder / 'annotations').mkdir()
    for split, coco, images in (('train', 'train2017', 'training'), ('val', 'val2017', 'validation')):
        content = json.loads((shapes / 'annotations' / f'instances_{split}.json').read_text())
        names = CocoDataset.METAINFO['classes']
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, start=1)]
        (folder / 'annotations' / f'instances_{coco}.json').write_text(json.dumps(content))
        (folder / coco).symlink_to(shapes / 'images' / images)
        for kind in ('leftImg8bit', 'gtFine'):
            (folder / kind / split).mkdir(parents=True)
        for number in range(2):
            image = np.random.default_rng(number).integers(0, 256, (128, 256, 3), np.uint8)
            labels = np.repeat(np.repeat(image[::32, ::32, 0] % 19, 32, 0), 32, 1)
            cv2.imwrite(str(folder / f'leftImg8bit/{split}/{number}_leftImg8bit.png'), image)
            cv2.imwrite(str(folder / f'gtFine/{split}/{number}_gtFine_labelTrainIds.png'), labels)
    return folder


def sixteenth(node):
    """Divide every size of the pipelines by 16."""
    if isinstance(node, dict):
        return {
            key: smaller(value) if key in ('scale', 'scales', 'crop_size') else sixteenth(value)
            for key, value in node.items()
        }
    return type(node)(sixteenth(inner) for inner in node) if isinstance(node, (list, tuple)) else node


def smaller(size):
    return type(size)(smaller(side) for side in size) if isinstance(size, (list, tuple)) else max(size // 16, 16)


def shrunken(name, data, folder):
    cfg = Config.fromfile(SCALE / name)
    model = cfg.model.get('module', cfg.model)
    model.backbone.arch = NARROW
    widths = [16, 32, 64, 128]
    if 'neck' in model:
        model.neck.in_channels = widths
        model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rcnn.score_thr = 0.0  # an untrained detector is sure of nothing
    else:
        model.decode_head.update(in_channels=widths, channels=16)
        model.auxiliary_head.update(in_channels=widths[2], channels=16)
        model.data_preprocessor.size = (64, 128)
    for augment in model.data_preprocessor.get('batch_augments') or []:
        augment.size = tuple(side // 16 for side in augment.size)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].update(num_workers=0, persistent_workers=False)
        dataset = cfg[loader].dataset.get('dataset', cfg[loader].dataset)
        dataset.data_root = str(data)
        if not cfg.model.get('module'):
            dataset.pipeline = sixteenth(dataset.pipeline)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if evaluator.get('ann_file'):
            evaluator.ann_file = str(data / 'annotations/instances_val2017.json')
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
    path = folder / name
    cfg.dump(path)
    return path


@pytest.mark.parametrize(
    'name', ['mask_rcnn_mila_t_lsj_1024.py', 'mask_rcnn_mila_t_1x_sync_bn.py', 'upernet_mila_t_cityscapes_1024x2048.py']
)
def test_trains_and_evaluates(name, data, tmp_path):
    runner = mila_mm.engine.train(str(shrunken(name, data, tmp_path)), work_dir=str(tmp_path / 'run'))
    history = runner.message_hub.log_scalars
    assert 0 < history['train/loss'].current() < 1e4
    assert 'val/coco/bbox_mAP' in history or 'val/mIoU' in history
    assert (type(runner.optim_wrapper).__name__ == 'AmpOptimWrapper') == ('sync_bn' not in name)
    if 'upernet' in name:  # tiles of the same model, in the test config
        tiled = shrunken('upernet_mila_t_cityscapes_tiled.py', data, tmp_path)
        options = ['model.tile=64,96', 'model.stride=48,64']
        metrics = mila_mm.engine.test(
            str(tiled), str(tmp_path / 'run/iter_2.pth'), work_dir=str(tmp_path / 'test'), cfg_options=options
        )
        assert 0 <= metrics['mIoU'] <= 100


def test_amp_fragments_stand_beside_the_other_parts(tmp_path):
    base = SCALE.parent / '_base_'
    for name, expected in (('amp', 'auto'), ('amp_bf16', 'bf16'), ('amp_fp16', 'fp16')):
        parts = [
            f'{base}/models/mask_rcnn_mila.py',
            f'{base}/schedules/mask_rcnn_adamw_1x.py',
            f'{base}/precision/{name}.py',
        ]
        (tmp_path / f'{name}.py').write_text(f'_base_ = {parts}\ndefault_scope = "mmdet"\n')
        assert load_config(str(tmp_path / f'{name}.py')).amp == expected


def test_fsdp_and_zero_configs():
    fsdp = Config.fromfile(SCALE / 'mask_rcnn_mila_b_3x_fsdp.py')
    assert fsdp.model_wrapper_cfg.type == 'mila_mm.FullyShardedModel' and fsdp.amp == 'bf16'
    zero = Config.fromfile(SCALE / 'mask_rcnn_mila_b_3x_zero.py').optim_wrapper.optimizer
    plain = Config.fromfile(SCALE.parent / 'mask_rcnn_mila_b_3x.py').optim_wrapper.optimizer
    assert zero.type == 'ZeroRedundancyOptimizer' and zero.optimizer_type == plain.type
    for key in ('lr', 'betas', 'weight_decay'):
        assert tuple(np.atleast_1d(zero[key])) == tuple(np.atleast_1d(plain[key]))
    assert set(zero) == set(plain) | {'optimizer_type'}


def test_fp16_fragment_on_a_cpu_is_refused(data, tmp_path):
    path = shrunken('mask_rcnn_mila_t_1x_sync_bn.py', data, tmp_path)
    with pytest.raises(UserError, match='needs a GPU'):
        mila_mm.engine.train(str(path), work_dir=str(tmp_path / 'run'), cfg_options=['amp=fp16'])
