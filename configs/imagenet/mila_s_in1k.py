# MILA small on ImageNet-1K.
_base_ = './mila_t_in1k.py'

model = dict(arch='small', drop_path_rate=0.3)
custom_hooks = [dict(type='mila_mm.MESAHook', ratio=1.5, begin_mesa_epoch=75, momentum=4e-4)]
