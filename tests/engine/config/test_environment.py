"""What a launcher says in the environment."""

import os

import pytest

from mila_mm.engine.config.environment import check_environment, name_ranks, rank_of
from mila_mm.errors import UserError

RIGHT = {
    'pytorch': dict(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2', MASTER_ADDR='::1', MASTER_PORT='1'),
    'slurm': dict(SLURM_PROCID='1', SLURM_NTASKS='4', SLURM_LOCALID='1', SLURM_NODELIST='n[1-2],m3', MASTER_ADDR='n1'),
    'mpi': dict(
        OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_LOCAL_RANK='1', MASTER_ADDR='a.b.example'
    ),
}
NAMES = sorted({name for names in RIGHT.values() for name in names} | {'SLURM_STEP_NODELIST', 'GLOO_SOCKET_IFNAME'})


@pytest.fixture(autouse=True)
def nothing_set() -> object:
    with pytest.MonkeyPatch.context() as patch:
        for name in (*NAMES, 'MILA_MM_STOP_GRACE', 'MILA_MM_STOP_MARKER', 'MILA_MM_MAX_STOPS'):
            patch.setenv(name, '')
            patch.delenv(name)
        yield patch


@pytest.mark.parametrize('launcher', RIGHT)
def test_ranks_get_torchs_names(launcher, monkeypatch) -> None:
    for name, value in RIGHT[launcher].items():
        monkeypatch.setenv(name, value)
    name_ranks(launcher)
    assert [os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['1', '4', '1']
    assert 0 < int(os.environ['MASTER_PORT']) < 65536
    assert rank_of(launcher) == 1 and rank_of('none') == 0


def test_without_a_launcher_it_is_no_matter_what_stands_there(monkeypatch) -> None:
    monkeypatch.setenv('RANK', 'x')
    monkeypatch.setenv('SLURM_PROCID', '1')
    name_ranks('none')
    assert rank_of('none') == 0


WRONG = [
    *(
        (launcher, name, value)
        for launcher, names in RIGHT.items()
        for name in names
        if 'RANK' in name or 'SIZE' in name or name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID')
        for value in ('', 'x', '-1', '1.0', ' 1', '٣', '4', '9' * 5000)
        if not (value == '4' and ('SIZE' in name or 'NTASKS' in name))
    ),
    *(('pytorch', 'MASTER_PORT', value) for value in ('', '0', '65536', 'http', '-1')),
    *((launcher, 'MASTER_ADDR', value) for launcher in RIGHT for value in ('', 'a b', 'a;b', '\x1b[2J', 'a' * 300)),
    *(('slurm', 'SLURM_NODELIST', value) for value in ('', '--help', 'a;reboot', '$(x)', 'a b', 'a\nb')),
    ('slurm', 'SLURM_STEP_NODELIST', '-x'),
    ('pytorch', 'LOCAL_WORLD_SIZE', '5'),
    ('pytorch', 'LOCAL_WORLD_SIZE', '1'),
    ('pytorch', 'GLOO_SOCKET_IFNAME', 'nosuchinterface'),
]


@pytest.mark.parametrize(('launcher', 'name', 'value'), WRONG)
def test_one_message_names_the_variable(launcher, name, value, monkeypatch) -> None:
    for key, right in RIGHT[launcher].items():
        monkeypatch.setenv(key, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='environment variable') as caught:
        name_ranks(launcher)
    said = str(caught.value)
    named = 'LOCAL_RANK' if (name, value) == ('LOCAL_WORLD_SIZE', '1') else name
    assert said.startswith(f'environment variable {named}: expected ') and said.count('\n') == 1 and len(said) < 600


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(('MILA_MM_STOP_GRACE', value) for value in ('soon', '-1', 'nan', 'inf', '1_0', '')),
        *(('MILA_MM_MAX_STOPS', value) for value in ('0', '-1', '1.5', 'x')),
        *(('MILA_MM_STOP_MARKER', value) for value in ('relative.json', '/tmp', '/tmp/a\nb')),
    ],
)
def test_variables_of_the_stop(name, value, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f'environment variable {name}: expected'):
        check_environment()


@pytest.mark.parametrize(('said', 'status'), [('', 0), ('-x\n', 0), ('', 1)])
def test_an_answer_of_scontrol_that_is_none(said, status, tmp_path, monkeypatch) -> None:
    (tmp_path / 'scontrol').write_text(f'#!/bin/sh\nprintf "%s" "{said}"; echo broken >&2; exit {status}\n')
    (tmp_path / 'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    for key, right in RIGHT['slurm'].items():
        monkeypatch.setenv(key, right)
    monkeypatch.delenv('MASTER_ADDR')
    with pytest.raises(UserError, match='scontrol does not tell the first machine'):
        name_ranks('slurm')
