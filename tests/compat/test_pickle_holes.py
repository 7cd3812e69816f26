"""Pickles that name nothing but data, and still do more than hold them."""

import pickle
import struct
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

import mila_mm  # noqa: F401 - what is tested here
from mila_mm.compat import pickles
from mila_mm.compat.pickles import UnsafePickleError


class Reduced:
    """Pickles as a call of a function, and a state where there is one."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


class Scalar(Reduced):
    """A number, by which a pickle can say any type of it."""

    def __init__(self, kind: object, data: object) -> None:
        super().__init__(np.float64(1).__reduce__()[0], (kind, data))


def array(shape: object, kind: object, content: object, *more: object) -> Reduced:
    reconstruct = np.zeros(1).__reduce__()[0]
    return Reduced(reconstruct, (np.ndarray, (0,), b'b'), (1, shape, kind, False, content, *more))


def typed(count: int = 4) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(
        wrap_storage=torch.ones(count).untyped_storage(), dtype=torch.float32, _internal=True
    )


def tensor(size: tuple, stride: tuple, *state: object) -> Reduced:
    return Reduced(torch._utils._rebuild_tensor_v2, (typed(), 0, size, stride, False, OrderedDict()), *state)


def in_a_zip() -> bytes:
    import io

    file = io.BytesIO()
    torch.save(torch.ones(3), file)
    return file.getvalue()


def nested(levels: int) -> bytes:
    """Return a tuple in a tuple, as the key of a dict."""
    return b'\x80\x02})' + b'\x85' * levels + b'Ns.'


def doubled(levels: int) -> bytes:
    """Return a tuple of a tuple twice, as the key of a dict: few bytes, and 2**levels values to hash."""
    return b'\x80\x02})' + b'2\x86' * levels + b'Ns.'


def arrays_in_arrays(levels: int) -> object:
    content: object = np.zeros(1)
    for _ in range(levels):
        outer = np.empty(1, object)
        outer[0] = content
        content = outer
    return content


HIDDEN = (3, '|', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 1, 0)
MASK = {'size': [10**6, 10**6], 'counts': b'11'}
OBJECT = np.empty(1, object)
OBJECT[0] = MASK
SPOILT = {
    'a number with a hidden pointer': Scalar(Reduced(np.dtype, ('V8', False, True), HIDDEN), struct.pack('<Q', 0)),
    'a number of a type with fields': Scalar(np.dtype([('a', 'i8')]), bytes(8)),
    'a number with objects in flags': Scalar(
        Reduced(np.dtype, ('f8',), (3, '<', None, None, None, -1, -1, 63)), b'8' * 8
    ),
    'a type that is longer': Reduced(np.dtype, ('S4',), (3, '|', None, None, None, 10**9, 1, 0)),
    'a type of many parts': Reduced(np.dtype, ('(1000000,1000000)f8',)),
    'a time of a wrong unit': Reduced(np.dtype, ('M8',), (4, '<', None, None, None, -1, -1, 0, ({}, (b'ns', 0, 1, 1)))),
    'an array with hidden pointers': array((1,), Reduced(np.dtype, ('V8',), HIDDEN), bytes(8)),
    'objects without a list': array((3,), np.dtype('O'), []),
    'very many objects': array((10**8,), np.dtype('O'), []),
    'objects in bytes': array((1,), np.dtype('O'), bytes(8)),
    'too few bytes': array((3,), np.dtype('f8'), bytes(8)),
    'too many bytes': array((1,), np.dtype('f8'), bytes(16)),
    'a negative shape': array((-1, -1), np.dtype('f8'), bytes(8)),
    'a buffer with hidden pointers': Reduced(
        np._core.numeric._frombuffer if hasattr(np, '_core') else np.core.numeric._frombuffer,
        (bytearray(8), Reduced(np.dtype, ('V8',), HIDDEN), (1,), 'C'),
    ),
    'a tensor with a state': tensor((4,), (1,), (typed(), 0, (2 * 10**8,), (1,))),
    'a tensor that repeats one number': torch.zeros(1).expand(10**12),
    'a storage in a zip': Reduced(torch.storage._load_from_bytes, (in_a_zip(),)),
    'a mask in an array of objects': [OBJECT],
    'very deep tuples': nested(100_000),
    'tuples twice in tuples': doubled(60),
    'arrays in arrays': arrays_in_arrays(150),
    'a class with another length': b'\x80\x02cmmengine.structures\nInstanceData\n}X\x05\x00\x00\x00canarK\x01sb.',
    'a class with attributes': b'\x80\x02cmmengine.structures\nInstanceData\nN}X\x05\x00\x00\x00canarK\x01s\x86b.',
    'a function with attributes': b'\x80\x02c_codecs\nencode\n}X\x05\x00\x00\x00canarK\x01sb.',
    'a sample with a state that is none': Reduced(InstanceData, (), (None, {'canar': 1})),
    'an item of a tensor': b'\x80\x02' + pickle.dumps(torch.ones(2), 2)[2:-1] + b'K\x00K\x05s.',
}


@pytest.mark.parametrize('name', list(SPOILT))
def test_what_reaches_beyond_data_is_refused(name: str) -> None:
    content = SPOILT[name]
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    # apart, as what is not refused may end the process
    program = (
        'import resource, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n'
        'import mmengine.structures, torch, mila_mm\nfrom mila_mm.compat import pickles\n'
        'try: pickles.loads(sys.stdin.buffer.read())\nexcept pickles.UnsafePickleError: print("refused")'
    )
    if name in PRONE:
        ended = subprocess.run([sys.executable, '-c', program], input=data, capture_output=True, check=False)
        assert ended.stdout == b'refused\n', ended.stderr[-500:]
    with pytest.raises((UnsafePickleError, pickle.UnpicklingError)):
        pickles.loads(data)
    assert not hasattr(InstanceData, 'canar')


def test_a_large_memo_index_takes_no_memory() -> None:
    assert pickles.loads(b'\x80\x02Nr' + struct.pack('<I', 2**32 - 1) + b'.') is None


DTYPES = ['f8', '>f4', 'i1', 'u2', '?', 'c8', 'f2', 'S5', 'U3', '>U2', 'M8[ns]', 'm8[25s]', 'O', 'g']


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_arrays_of_plain_types_come_through(dtype: str, shape: tuple, protocol: int) -> None:
    made = np.zeros(shape, dtype)
    for content in (made, np.asfortranarray(made), made.dtype, [made, made]):
        read = pickles.loads(pickle.dumps(content, protocol=protocol))
        expected = pickle.loads(pickle.dumps(content, protocol=protocol))
        assert repr(read) == repr(expected)
        assert type(read) is type(expected)
    again = pickles.loads(pickle.dumps(made, protocol=protocol))
    assert (
        type(again) is np.ndarray
        and again.dtype == pickle.loads(pickle.dumps(made, protocol=protocol)).dtype
        and again.flags.writeable
    )
    if shape == () and dtype != 'O':
        assert repr(pickles.loads(pickle.dumps(made[()], protocol=protocol))) == repr(made[()])


def test_pickles_of_numpy_1_and_of_python_2_come_through() -> None:
    data = pickle.dumps(np.arange(3.0), protocol=2)
    old = data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    assert np.array_equal(pickles.loads(old), np.arange(3.0))
    python2 = (
        b'\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n'
        b'U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xff\x01tb.'
    )
    assert pickles.loads(python2, encoding='latin1').tolist() == [255, 1]


@pytest.mark.parametrize(
    'data',
    [b'\x80\x02(', b'\x80\x02a.', b'\x80\x02h\x05.', b'\x80\x05\x96' + b'\xff' * 7 + b'\x0f.', b'\x80\x04\x95\x01'],
)
def test_damage_is_told_as_pickle_tells_it(data: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        pickles.loads(data)


def test_numpy_keeps_its_own_types() -> None:
    before = np.dtype('f8').byteorder
    spoil = Reduced(np.dtype, ('f8', False, False), (3, '>', None, None, None, -1, -1, 0))
    assert pickles.loads(pickle.dumps(spoil)) == np.dtype('>f8')
    assert np.dtype('f8').byteorder == before


def test_tensors_that_repeat_a_little_come_through() -> None:
    repeated = torch.ones(1, 3).expand(5, 3)
    assert torch.equal(pickles.loads(pickle.dumps(repeated)), repeated)


PRONE = {'objects without a list', 'a number with a hidden pointer', 'very deep tuples'}
