# UperNet, MILA tiny, ADE20K, whole-image testing; tools/test.py --tta for the multi-scale column. The paper trained the
# base size only; drop path 0.2 here and 0.3 in small are ours, after the ImageNet rates of the paper.
_base_ = [
    './_base_/models/upernet_mila.py',
    'mmseg::_base_/datasets/ade20k.py',
    './_base_/schedules/upernet_adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=2)  # on each of 8 GPUs
