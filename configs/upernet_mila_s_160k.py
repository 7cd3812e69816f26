_base_ = './upernet_mila_t_160k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
