_base_ = './_base_/upernet_160k.py'

model = dict(backbone=dict(forget_gate=True))
