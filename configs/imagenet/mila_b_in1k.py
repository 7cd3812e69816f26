# MILA base on ImageNet-1K.
_base_ = './mila_t_in1k.py'

model = dict(arch='base', drop_path_rate=0.5)
custom_hooks = [dict(type='mila_mm.MESAHook', ratio=2.0, begin_mesa_epoch=75, momentum=4e-4)]
