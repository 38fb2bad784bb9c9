"""Chunks of zarr stores: what they unpack to, found before zarr holds it in memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any

from ..errors import CellFileError

COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib", "bz2", "lzma", "lz4"})
_UNPACKED_FROM = {"gzip": 1 << 20, "zlib": 1 << 20, "bz2": 1 << 10, "lzma": 1 << 14, "zstd": 1 << 15}
"""Bytes of a compressed chunk that can stand for a gigabyte: from there on, what it unpacks to is looked at."""
MOST_CHUNK_BYTES = 4 << 30
"""Largest chunk of an array, which is held in memory to read any value in it. HDF5 itself allows no more."""


def check_chunk(root: Path, path: Path, n_bytes: int | None, compressor: str | None) -> None:
    """Refuse a chunk of a zarr store that is larger than what it stands for, or unpacks to more.

    Args:
        root, path (`Path`): the store and the file of the chunk.
        n_bytes (`int`, *optional*): bytes of values that the array declares for each chunk, None for text, whose size no metadata tells.
        compressor (`str`, *optional*): the codec of `COMPRESSORS` that it goes through.

    Raises:
        CellFileError
    """
    # Filters may store values in a wider type.
    size, most = path.stat().st_size, 8 * n_bytes + (1 << 16) if n_bytes is not None else MOST_CHUNK_BYTES
    if n_bytes is not None and size > most:
        msg = f"{root}: the chunk {path.relative_to(root)} has {size:,} bytes for {n_bytes:,} bytes of values. The store is damaged; write it again."
        raise CellFileError(msg)
    if compressor in _UNPACKED_FROM and size >= _UNPACKED_FROM[compressor] and _unpacks_beyond(path, compressor, most):
        msg = f"{root}: the chunk {path.relative_to(root)} unpacks from {size:,} bytes to more than {most:,}, eight times what its array declares or what is read of any. It is damaged, or was made to fill memory; write it again."
        raise CellFileError(msg)


def _unpacks_beyond(path: Path, compressor: str, most: int) -> bool:
    """Return whether a compressed chunk holds more than so many bytes, without holding them. Damage is left to zarr."""
    if compressor == "zstd":
        with path.open("rb") as file:
            return (_zstd_size(file.read(18)) or 0) > most
    with path.open("rb") as file:
        openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.BZ2File, "lzma": lzma.LZMAFile}
        opened = openers.get(compressor, _ZlibParts)(file)
        n = 0
        try:
            while part := opened.read(1 << 20):
                n += len(part)
                if n > most:
                    return True
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
            return False
    return False


class _ZlibParts:
    """A file of one zlib stream that is read in parts."""

    def __init__(self, file: Any) -> None:
        self._file, self._unpacker = file, zlib.decompressobj()

    def read(self, n: int) -> bytes:
        """Return at most n bytes more, none at the end."""
        while not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._file.read(n)
            if not packed:
                return b""
            if part := self._unpacker.decompress(packed, n):
                return part
        return b""


def _zstd_size(head: bytes) -> int | None:
    """Return the size that the header of a Zstandard frame declares (RFC 8878, 3.1.1), None where it declares none."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    single, kind = flags >> 5 & 1, flags >> 6
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[kind]
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0) if width else None
