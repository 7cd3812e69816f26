"""What the host does in a training step may not grow unseen."""

import torch

from benchmarks import host_time, launches

DISPATCHED, INSIDE = 471, 894  # when last changed on purpose
ALLOWED = 1.1


def test_dispatched_calls():
    torch.manual_seed(0)
    assert launches.count(launches.mila()).total() <= min(500, ALLOWED * DISPATCHED)
    assert launches.count(launches.mila(fused='auto')).total() <= min(500, ALLOWED * DISPATCHED)


def test_calls_and_kernels_inside_of_the_ops():
    calls = launches.count_inside(launches.mila())
    assert calls.total() <= min(900, ALLOWED * INSIDE)
    assert calls['kernel batch_norm_kernel'] == calls['kernel batch_norm_backward_kernel'] == 8
    assert calls['kernel state_kernel'] == 18 and calls['kernel cpe_norm_kernel'] == 36


class OneConvolution(torch.nn.Conv2d):
    def forward(self, x):
        return (super().forward(x).flatten(2).transpose(1, 2),)


def test_views_do_not_count():
    counts = launches.count(OneConvolution(3, 2, 1), side=4)
    assert counts['convolution'] == counts['convolution_backward'] == 1
    assert not {'view', 'transpose', 't', 'flatten'} & set(counts)


def test_host_time(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['host_time', '--rounds', '1'])
    threads = torch.get_num_threads()
    try:
        assert host_time.main() == 0
    finally:
        torch.set_num_threads(threads)
    assert float(capsys.readouterr().out.splitlines()[-1].removeprefix('ratio ')) > 0
