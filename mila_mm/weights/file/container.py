"""Is this file a checkpoint at all? Answered from its bytes, without unpickling or allocating.

Used on every fetched file before it takes its final name and on every file before it is read. Only
the standard library: the answer is needed in processes that never import torch.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

from mila_mm.errors import printable
from mila_mm.files import open_regular
from mila_mm.weights.errors import CheckpointError, MissingCheckpointError

ZIP, LEGACY, SAFETENSORS = 'zip', 'legacy', 'safetensors'
_HEAD = 512
# torch.save before 1.6 writes a pickled magic number first.
_LEGACY_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_NOT_CHECKPOINTS = (
    (
        re.compile(rb'^\s*(<!doctype html|<html|<\?xml|<head)', re.IGNORECASE),
        'a web page, not a checkpoint; a share link that expired or asks for a login answers so',
    ),
    (re.compile(rb'^version https://git-lfs'), 'a Git LFS pointer, not the file itself; run `git lfs pull`'),
    (re.compile(rb'^\s*[{\[]"'), 'a JSON text, not a checkpoint; a server that refuses a download may answer so'),
    (re.compile(rb'^\x1f\x8b'), 'compressed with gzip; decompress it first'),
    (re.compile(rb'^(BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!)'), 'a compressed archive; unpack it first'),
    (re.compile(rb'^\x89HDF'), 'an HDF5 file (Keras?), not a PyTorch checkpoint'),
)
# A safetensors header of this size describes about a million tensors.
_MAX_HEADER = 100 << 20
# Of a zip record: encrypted, patched data, strongly encrypted.
_FOREIGN_FLAGS = 0x1 | 0x20 | 0x40
# What zipfile raises where an archive, its directory or the header in front of a record is damaged.
DAMAGED_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error, zlib.error)
# torch takes a record that is marked so for empty.
_DIRECTORY = 0x10


def sniff(path: Path) -> str:
    """Tell the format of a checkpoint from its first bytes.

    Returns:
        ``'zip'`` (torch.save since 1.6), ``'legacy'`` (before) or ``'safetensors'``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is a folder, empty, unreadable or of no known format.
    """
    if path.is_dir():
        raise CheckpointError(f'{path}: a folder, expected a checkpoint file (.pth or .safetensors)')
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except FileNotFoundError as error:
        raise MissingCheckpointError(f'{path}: no such file') from error
    except ValueError as error:  # a NUL byte in the name
        raise CheckpointError(f'{path}: not a path ({error})') from error
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror})') from error
    if not head:
        raise CheckpointError(f'{path}: empty (0 bytes); a download or a copy was cut off, fetch it again')
    if head.startswith(b'PK\x03\x04'):
        return ZIP
    if head.startswith(_LEGACY_START):
        return LEGACY
    for pattern, meaning in _NOT_CHECKPOINTS:
        if pattern.match(head):
            raise CheckpointError(f'{path}: {meaning}')
    if head[257:262] == b'ustar':
        raise CheckpointError(
            f'{path}: a tar archive; either unpack it, or, if torch 0.1 wrote it as a checkpoint, '
            'load and save it there again: that format cannot be read safely'
        )
    if len(head) > 9 and head[8:9] == b'{':
        return SAFETENSORS
    kind = 'a bare pickle, not made by torch.save' if head[:1] == b'\x80' else 'of no known checkpoint format'
    raise CheckpointError(
        f'{path}: {kind}; expected a file made by torch.save or safetensors '
        f'(first bytes: {head[:8]!r}); truncated or damaged?'
    )


def check(path: Path) -> str:
    """Check that a file is a whole checkpoint which declares no more than it holds.

    Returns:
        Its format, as :func:`sniff`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is truncated, damaged, or its declared sizes exceed its bytes.
    """
    kind = sniff(path)
    if kind == ZIP:
        check_zip(path)
    elif kind == SAFETENSORS:
        check_safetensors(path)
    return kind


def check_zip(path: Path) -> zipfile.ZipInfo:
    """Check the directory of a zip checkpoint.

    torch stores its records uncompressed, so a compressed record is either a foreign zip or a bomb:
    refusing it bounds everything that can be read by the size of the file.

    Returns:
        The record that holds the pickle.

    Raises:
        CheckpointError: If the file is truncated, compressed, overlapping, or no checkpoint.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except DAMAGED_ZIP as error:
        raise CheckpointError(
            f'{path}: truncated or damaged ({error}, {size:,} bytes); fetch or copy it again'
        ) from error
    # torch looks records up without regard to case, and from the start of the file
    names = [record.filename.lower() for record in records]
    if min((record.header_offset for record in records), default=0):
        raise CheckpointError(f'{path}: a zip archive behind other data, which torch.save never writes; damaged?')
    if any(name.endswith('/constants.pkl') for name in names):
        raise CheckpointError(f'{path}: a TorchScript archive, which is a program; expected a checkpoint of weights')
    pickles = [record for record in records if re.fullmatch(r'[^/]+/data\.pkl', record.filename.lower())]
    if len(pickles) != 1:
        raise CheckpointError(
            f'{path}: a zip archive without a checkpoint in it (no data.pkl); if it was packed by hand, unzip it first'
        )
    for record in records:
        name = printable(record.filename)
        if record.flag_bits & _FOREIGN_FLAGS:
            raise CheckpointError(
                f'{path}: record {name} is encrypted or patched, which torch.save never does; '
                'expected a checkpoint as it was saved'
            )
        if record.external_attr & _DIRECTORY or record.is_dir():
            raise CheckpointError(
                f'{path}: record {name} is marked as a folder, which torch.save never writes; damaged?'
            )
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f'{path}: record {name} is compressed and declares {record.file_size:,} bytes; torch'
                '.save never compresses, so this is no checkpoint (or a zip bomb)'
            )
        if record.file_size != record.compress_size or record.header_offset + record.file_size > size:
            raise CheckpointError(
                f'{path}: record {name} declares {record.file_size:,} bytes, '
                f'more than the file holds ({size:,}); damaged, or a zip bomb'
            )
    if sum(record.file_size for record in records) > size or len(set(names)) != len(names):
        raise CheckpointError(f'{path}: its records overlap or repeat; damaged, or a zip bomb')
    return pickles[0]


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file.

    Raises:
        CheckpointError: If the header is damaged or the tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        (length,) = struct.unpack('<Q', file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f'{path}: a safetensors header of {length:,} bytes in a file of {size:,}; truncated or damaged'
            )
        try:
            header = json.loads(file.read(length))
            ends = [entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__']
            if any(type(end) is not int for end in ends):
                raise ValueError('data_offsets that are not whole numbers')
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f'{path}: its safetensors header is damaged ({error})') from error
    if max(ends, default=0) != size - 8 - length:
        raise CheckpointError(
            f'{path}: its tensors need {max(ends, default=0):,} bytes, '
            f'the file has {size - 8 - length:,}; truncated or damaged'
        )


PICKLE_ERRORS = (
    # What damaged or hostile pickles make an unpickler raise.
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    AssertionError,
    struct.error,
    MemoryError,
    OverflowError,
    ImportError,
    OSError,
)
