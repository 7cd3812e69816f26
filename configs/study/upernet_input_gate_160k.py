_base_ = './_base_/upernet_160k.py'

model = dict(backbone=dict(input_gate=True))
