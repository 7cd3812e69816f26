_base_ = './_base_/upernet_160k.py'

model = dict(backbone=dict(positional_encoding=('lepe', 'cpe', 'rope')))
