"""HDF5 files and zarr stores checked before an array in them is read: no links out, known codecs, sizes that fit memory.

A store is data from somebody else. Its metadata may point at other files of this disk, name a codec that runs code, or
declare arrays larger than memory; each is refused by name before any value is read.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil

from ..errors import CellFileError
from ..input_files import read_json, require_regular
from .zarr_chunks import COMPRESSORS, MOST_CHUNK_BYTES, UNPACKED_FROM, ChunkLayout, check_chunk, unpacks_beyond

HDF5_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 32000: "lzf"}
PLUGIN_FILTERS = {32001: "blosc", 32026: "blosc2", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd"}
"""Read where hdf5plugin is installed."""
HDF5_COMPRESSORS = frozenset({1, 4, 32000, 32001, 32004, 32015, 32026})
_SEEN_THROUGH = {1: "zlib", 32001: "blosc", 32015: "zstd"}
"""HDF5 filters whose chunks can stand for thousands of times their size, and the codec of `zarr_chunks` that they write."""
ZARR_CODECS = frozenset(
    {
        *("blosc", "zstd", "gzip", "zlib", "bz2", "lzma", "lz4", "shuffle", "delta", "crc32", "crc32c", "adler32", "fletcher32"),
        *("vlen-utf8", "vlen-bytes", "vlen-array", "fixedscaleoffset", "quantize", "packbits", "bitround", "astype", "categorize"),
        *("bytes", "endian", "transpose", "sharding_indexed"),
    }
)
"""Codecs of zarr 2 (numcodecs) and 3 that turn bytes into numbers or text and do nothing else."""
MOST_OF_MEMORY = 0.5
"""Fraction of the free memory that one array of a value per cell or gene may take."""

_checked: set[tuple[str, int, int, int]] = set()


def require_memory(n_bytes: int, what: str) -> None:
    """Raise if reading something would take more than half of the free memory.

    Raises:
        CellFileError
    """
    free = psutil.virtual_memory().available
    if n_bytes > free * MOST_OF_MEMORY:
        msg = (
            f"{what} would take {n_bytes / 1e9:,.1f} GB of memory; expected at most {free * MOST_OF_MEMORY / 1e9:,.1f} GB, half of what is free. "
            "The size in its header may be wrong; otherwise split the file, or use a machine with more memory."
        )
        raise CellFileError(msg)


def check_h5(path: Path, file: h5py.File) -> None:
    """Refuse an HDF5 file that reaches outside itself, uses unknown filters, or declares chunks no machine could hold.

    Each version of a file (size, time, inode) is looked at once in a process.

    Raises:
        CellFileError: naming the link or array, what it does, and what to do.
    """
    status = path.stat()
    version = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
    if version in _checked:
        return
    problem: list[str] = []

    def look(name: str | bytes, link: Any) -> bool | None:
        shown = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
        if isinstance(link, h5py.ExternalLink):
            problem.append(f"{shown!r} is a link into another file ({link.filename})")
        elif isinstance(link, h5py.HardLink):
            reason = _reason_against(h5py.h5o.open(file.id, name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")))
            if reason:
                problem.append(f"{shown!r} {reason}")
        elif not isinstance(link, h5py.SoftLink):
            problem.append(f"{shown!r} is a link of an unknown kind")
        return True if problem else None

    try:
        file.visititems_links(look)
    except (SystemError, UnicodeError) as error:
        msg = f"{path}: a name in it is not text in UTF-8 ({error.__cause__ or error}). Write the file again with anndata (`adata.write_h5ad(...)`)."
        raise CellFileError(msg) from error
    if problem:
        msg = f"{path}: {problem[0]}. Only data inside the file itself is read; write the file again with anndata (`adata.write_h5ad(...)`) where its sources are."
        raise CellFileError(msg)
    _checked.add(version)


def require_h5_dataset(dataset: h5py.Dataset, where: str) -> None:
    """Refuse one array as `check_h5` does, for those reached through a reference rather than a link.

    Raises:
        CellFileError
    """
    reason = _reason_against(dataset.id)
    if reason:
        msg = f"{where}: {dataset.name!r} {reason}. Write the file again with anndata."
        raise CellFileError(msg)


def _reason_against(item: Any) -> str | None:
    """Return why an HDF5 object is not read, None where it may be."""
    if not isinstance(item, h5py.h5d.DatasetID):
        return None
    creation = item.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        return "is a virtual dataset, made of parts of other files"
    if creation.get_external_count():
        name = creation.get_external(0)[0]
        return f"keeps its values in another file ({name.decode('utf-8', 'backslashreplace')})"
    codes = [creation.get_filter(place)[0] for place in range(creation.get_nfilters())]
    if sum(code in HDF5_COMPRESSORS for code in codes) > 1:
        return "is compressed more than once"
    for place in range(creation.get_nfilters()):
        code, _, _, name = creation.get_filter(place)
        if code in HDF5_FILTERS:
            continue
        shown = name.decode("utf-8", "backslashreplace").split("\0")[0] or "unnamed"
        if code not in PLUGIN_FILTERS:
            known = [*HDF5_FILTERS.values(), *PLUGIN_FILTERS.values()]
            return f"is compressed by the filter {code} ({shown}); expected one of {', '.join(known)}"
        if importlib.util.find_spec("hdf5plugin") is None:
            return f"is compressed by {PLUGIN_FILTERS[code]}, which needs the package hdf5plugin (`pip install hdf5plugin`)"
        # Importing it registers the filters with the library.
        importlib.import_module("hdf5plugin")
    if creation.get_layout() == h5py.h5d.CHUNKED:
        n_bytes = int(np.prod([int(n) for n in creation.get_chunk()], dtype=object)) * item.get_type().get_size()
        shape, chunk = item.shape, creation.get_chunk()
        whole = int(np.prod([-(-n // part) * part for n, part in zip(shape, chunk, strict=True)], dtype=object)) * item.get_type().get_size()
        if item.get_storage_size() > 8 * whole + (1 << 16):
            return f"has {item.get_storage_size():,} bytes for {whole:,} bytes of values"
        if n_bytes > MOST_CHUNK_BYTES:
            return f"is cut into chunks of {n_bytes / 1e9:,.1f} GB; expected at most {MOST_CHUNK_BYTES / 1e9:,.1f} GB"
        packer = next((code for code in codes if code in _SEEN_THROUGH), None)
        if packer is not None and item.get_storage_size() >= UNPACKED_FROM[_SEEN_THROUGH[packer]]:
            return _oversized_chunk(item, _SEEN_THROUGH[packer], codes.index(packer), 8 * n_bytes + (1 << 16))
    return None


def _oversized_chunk(item: Any, compressor: str, place: int, most: int) -> str | None:
    """Return which chunk of an HDF5 array unpacks to more than so many bytes, None where none does. Chunks too small for a gigabyte are not looked at."""
    large: list[tuple[int, ...]] = []

    def look(chunk: Any) -> None:
        # A bit says that the filter at its place was skipped.
        if chunk.size >= UNPACKED_FROM[compressor] and not chunk.filter_mask >> place & 1:
            large.append(chunk.chunk_offset)

    item.chunk_iter(look)
    for offset in large:
        _, packed = item.read_direct_chunk(offset)
        if unpacks_beyond(io.BytesIO(packed), compressor, most):
            return f"has a chunk that unpacks from {len(packed):,} bytes to more than {most:,}, eight times what it declares"
    return None


def check_zarr(path: Path) -> None:
    """Refuse a zarr store that holds links or special files, names a codec outside `ZARR_CODECS`, or declares huge chunks.

    The metadata files are read as JSON; zarr itself is not asked before they have passed.

    Raises:
        CellFileError: naming the file or array, what it does, and what to do.
    """
    files = list(files_of(path))
    arrays: dict[Path, ChunkLayout] = {}
    for file in files:
        if file.name in (".zarray", "zarr.json") and (layout := _check_array_metadata(path, file, str(file.relative_to(path)))) is not None:
            arrays[file.parent] = layout
    for file in files:
        if file.name != "zarr.json" and not file.name.startswith(".z"):
            owner = next((folder for folder in file.parents if folder in arrays), None)
            if owner is not None:
                check_chunk(path, file, arrays[owner])


def files_of(root: Path) -> Iterator[Path]:
    """Yield all files below a folder of cells, such as a zarr store.

    Raises:
        CellFileError: at the first symbolic link, pipe, device or socket.
    """
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    where = Path(entry.path).relative_to(root)
                    msg = f"{root}: {where} is a symbolic link ({Path(entry.path).readlink()}). Only data inside the folder itself is read; copy it with its links followed (`cp -rL`)."
                    raise CellFileError(msg)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                require_regular(entry.path)
                yield Path(entry.path)


def _check_array_metadata(root: Path, path: Path, where: str) -> ChunkLayout | None:
    """Refuse the codecs and chunks of one array, as its metadata states them; return how its chunks lie, None for a group."""
    metadata = read_json(path)
    if not isinstance(metadata, dict):
        msg = f"{root}: {where} does not hold a JSON object. The store is damaged; write it again."
        raise CellFileError(msg)
    if path.name == "zarr.json" and metadata.get("node_type") != "array":
        return None
    for name in _codec_names(metadata):
        known = name.removeprefix("numcodecs.") if isinstance(name, str) else name
        if not isinstance(known, str) or known not in ZARR_CODECS:
            msg = (
                f"{root}: {where} names the codec {name!r}, which is not one of those that are read ({', '.join(sorted(ZARR_CODECS))}). "
                "It was refused and nothing of it was executed. Write the store again with anndata (`adata.write_zarr(...)`)."
            )
            raise CellFileError(msg)
    for names in _pipelines(metadata):
        if len(names) > 1:
            msg = f"{root}: {where} compresses its chunks {len(names)} times ({', '.join(names)}); expected once. Write the store again with anndata (`adata.write_zarr(...)`)."
            raise CellFileError(msg)
    if metadata.get("storage_transformers"):
        msg = f"{root}: {where} names storage transformers, which are not read. Write the store again with anndata (`adata.write_zarr(...)`)."
        raise CellFileError(msg)
    shape = _chunk_shape(metadata)
    size = _value_bytes(metadata)
    n_values = None if shape is None else int(np.prod(shape, dtype=object))
    # Text counts as pointers.
    n_bytes = None if n_values is None else n_values * (size or 8)
    if n_bytes is None or n_bytes > MOST_CHUNK_BYTES:
        found = "no readable chunk shape and data type" if n_bytes is None else f"chunks of {n_bytes / 1e9:,.1f} GB"
        msg = f"{root}: {where} declares {found}; expected chunks of at most {MOST_CHUNK_BYTES / 1e9:,.1f} GB. The store is damaged; write it again with smaller chunks."
        raise CellFileError(msg)
    pipelines = list(_pipelines(metadata))
    shards = [codec for codec in _codecs(metadata) if codec.get("name") == "sharding_indexed"]
    if not shards:
        return ChunkLayout(n_values or 0, size, pipelines[0][0] if pipelines and pipelines[0] else None)
    return _shard_layout(shards, n_values or 0, size, f"{root}: {where}")


def _shard_layout(shards: list[dict[str, Any]], n_values: int, size: int | None, where: str) -> ChunkLayout:
    """Return how the chunks of an array lie in its shards.

    Raises:
        CellFileError: for shards inside shards, and an index that is not written as zarr does.
    """
    settings = shards[0].get("configuration")
    settings = settings if isinstance(settings, dict) else {}
    inner = _chunk_shape({"chunks": settings.get("chunk_shape")})
    n_inner = int(np.prod(inner, dtype=object)) if inner else 0
    codecs = _codecs(settings)
    index = [(codec.get("name"), codec.get("configuration")) for codec in _codecs({"codecs": settings.get("index_codecs")})]
    is_known = index[:1] == [("bytes", {"endian": "little"})] and [name for name, _ in index[1:]] in ([], ["crc32c"])
    if len(shards) > 1 or not n_inner or n_values % n_inner or not is_known or any(codec.get("name") == "sharding_indexed" for codec in codecs):
        msg = f"{where} lays out its shards in a way that is not read ({n_values:,} values in chunks of {n_inner:,}, index written by {', '.join(str(name) for name, _ in index) or 'nothing'}). Write the store again with anndata (`adata.write_zarr(...)`)."
        raise CellFileError(msg)
    packed = next(_pipelines(settings), [])
    n_in_shard = n_values // n_inner
    return ChunkLayout(
        n_inner, size, packed[0] if packed else None, n_in_shard, 16 * n_in_shard + 4 * (len(index) - 1), settings.get("index_location") == "start"
    )


def _codecs(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the codecs of an array or shard of version 3 that are objects."""
    codecs = metadata.get("codecs")
    return [codec for codec in codecs if isinstance(codec, dict)] if isinstance(codecs, list) else []


def _pipelines(metadata: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the compressors that each list of codecs of an array goes through, those of its chunks first."""
    if "codecs" in metadata:
        lists = [metadata["codecs"]]
    else:
        filters = metadata.get("filters")
        lists = [[*(filters if isinstance(filters, list) else []), metadata.get("compressor")]]
    while lists:
        codecs = [codec for codec in lists.pop(0) if isinstance(codec, dict)]
        yield [name for codec in codecs if (name := str(codec.get("id", codec.get("name"))).removeprefix("numcodecs.")) in COMPRESSORS]
        inside = [codec["configuration"] for codec in codecs if isinstance(codec.get("configuration"), dict)]
        lists += [part[key] for part in inside for key in ("codecs", "index_codecs") if isinstance(part.get(key), list)]


def _codec_names(metadata: dict[str, Any]) -> Iterator[Any]:
    """Yield the names of all codecs of an array, those inside shards included."""
    stack = [metadata.get("compressor"), metadata.get("filters"), metadata.get("codecs")]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            yield item.get("id", item.get("name"))
            inside = item.get("configuration")
            settings = {**item, **inside} if isinstance(inside, dict) else item
            stack += [settings.get(key) for key in ("codecs", "index_codecs", "filters", "compressor")]
        elif item is not None:
            yield item


def _chunk_shape(metadata: dict[str, Any]) -> list[int] | None:
    """Return the shape of a chunk, or a shard, as declared; None where the metadata does not say."""
    grid = metadata.get("chunk_grid")
    shape = metadata.get("chunks")
    if shape is None and isinstance(grid, dict) and isinstance(grid.get("configuration"), dict):
        shape = grid["configuration"].get("chunk_shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        return None
    if 0 in shape and 0 not in (metadata.get("shape") or [1]):
        return None
    return shape


def _value_bytes(metadata: dict[str, Any]) -> int | None:
    """Return the bytes of one value of an array; None for text, whose size no metadata tells."""
    kind = metadata.get("dtype", metadata.get("data_type"))
    try:
        dtype = np.dtype(kind) if isinstance(kind, str) else None
    except (TypeError, ValueError):
        return None
    return None if dtype is None or dtype.hasobject else dtype.itemsize or None
