"""Chunks of zarr stores: what they unpack to, found before zarr holds it in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ..errors import CellFileError

COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib", "bz2", "lzma", "lz4"})
UNPACKED_FROM = {"gzip": 1 << 20, "zlib": 1 << 20, "lz4": 1 << 20, "bz2": 1 << 10, "lzma": 1 << 14, "zstd": 1 << 15, "blosc": 1 << 12}
"""Bytes of a compressed chunk that can stand for a gigabyte: from there on, what it unpacks to is looked at."""
MOST_CHUNK_BYTES = 4 << 30
"""Largest chunk of an array, which is held in memory to read any value in it. HDF5 itself allows no more."""
MOST_TEXT_BYTES = 1 << 16
"""Bytes of a text in an array of text, whose size no metadata tells."""


@dataclass(frozen=True)
class ChunkLayout:
    """What the metadata of an array says of its chunks; of those inside its shards, where it has shards."""

    n_values: int
    value_bytes: int | None
    """None for text, whose size no metadata tells."""
    compressor: str | None
    """The codec of `COMPRESSORS` that the chunks go through."""
    n_in_shard: int = 0
    """Chunks in each shard; 0 where chunks are files."""
    index_bytes: int = 0
    """Length of the index of a shard."""
    index_first: bool = False
    """Whether the index is at the beginning of a shard, not at its end."""

    @property
    def most(self) -> int:
        """Bytes that a chunk may unpack to. Filters may store values in a wider type."""
        each = MOST_TEXT_BYTES if self.value_bytes is None else 8 * self.value_bytes
        return min(self.n_values * each + (1 << 16), MOST_CHUNK_BYTES if self.value_bytes is None else 8 * MOST_CHUNK_BYTES)


def check_chunk(root: Path, path: Path, layout: ChunkLayout) -> None:
    """Refuse a chunk of a zarr store, or a shard of them, that is larger than what it stands for, or unpacks to more.

    Args:
        root, path (`Path`): the store and the file of the chunk.

    Raises:
        CellFileError
    """
    size, what = path.stat().st_size, f"{root}: the chunk {path.relative_to(root)}"
    whole = layout.most * max(1, layout.n_in_shard) + layout.index_bytes
    if layout.value_bytes is not None and size > whole:
        n_bytes = layout.n_values * layout.value_bytes * max(1, layout.n_in_shard)
        msg = f"{what} has {size:,} bytes for {n_bytes:,} bytes of values. The store is damaged; write it again."
        raise CellFileError(msg)
    if layout.compressor is None or size < UNPACKED_FROM[layout.compressor]:
        return
    with path.open("rb") as file:
        for start, length in _chunks_of(file, size, layout, what):
            if length >= UNPACKED_FROM[layout.compressor] and unpacks_beyond(_Part(file, start, length), layout.compressor, layout.most):
                msg = f"{what} unpacks from {length:,} bytes to more than {layout.most:,}, eight times what its array declares or what is read of any. It is damaged, or was made to fill memory; write it again."
                raise CellFileError(msg)


def _chunks_of(file: BinaryIO, size: int, layout: ChunkLayout, what: str) -> list[tuple[int, int]]:
    """Return where the chunks of a file begin and how long they are: the file itself, or those of a shard that are there."""
    if not layout.n_in_shard:
        return [(0, size)]
    file.seek(0 if layout.index_first else max(0, size - layout.index_bytes))
    # A checksum may follow the pairs of offset and length.
    index = file.read(min(layout.index_bytes, 16 * layout.n_in_shard))
    if len(index) < 16 * layout.n_in_shard:
        msg = f"{what} has {size:,} bytes, fewer than the index of {layout.n_in_shard:,} chunks takes. The store is damaged; write it again."
        raise CellFileError(msg)
    pairs = np.frombuffer(index, dtype="<u8").reshape(-1, 2)
    there = pairs[(pairs != np.iinfo(np.uint64).max).any(axis=1)].tolist()
    if any(start + length > size for start, length in there):
        msg = f"{what} has {size:,} bytes, and its index names chunks beyond them. The store is damaged; write it again."
        raise CellFileError(msg)
    return [(start, length) for start, length in there]


def unpacks_beyond(part: io.RawIOBase | io.BytesIO, compressor: str, most: int) -> bool:
    """Return whether a compressed chunk holds more than so many bytes, without holding them. Damage is left to zarr."""
    if compressor in ("zstd", "blosc", "lz4"):
        declared = _declared_size(part.read(18) or b"", compressor)
        part.seek(0)
        if declared is not None or compressor != "zstd":
            return (declared or 0) > most
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.BZ2File, "lzma": lzma.LZMAFile, "zstd": _open_zstd}
    n = 0
    try:
        opened = openers.get(compressor, _ZlibParts)(part)
        while piece := opened.read(1 << 20):
            n += len(piece)
            if n > most:
                return True
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return False
    return False


def _open_zstd(part: io.RawIOBase | io.BytesIO) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(part, mode="r"), "zstd")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        read = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)


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


def _declared_size(head: bytes, compressor: str) -> int | None:
    """Return the size that the header of a chunk declares, None where it declares none.

    Zstandard frames: RFC 8878, 3.1.1. Blosc: bytes 4 to 8 of its header. LZ4 as numcodecs writes it: the first four bytes.
    """
    if compressor != "zstd":
        return int.from_bytes(head[4:8] if compressor == "blosc" else head[:4], "little")
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    single, kind = flags >> 5 & 1, flags >> 6
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[kind]
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0) if width else None
