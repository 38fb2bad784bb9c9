"""HDF5 files, zarr stores, 10x folders and scDL archives that reach outside themselves, name code, or declare absurd sizes."""

import gzip
import json
import os
import shutil
import time
import tracemalloc
import zlib
from pathlib import Path

import anndata
import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from geneformer_hf import load_cells, stream_cells
from geneformer_hf.cli.main import main
from geneformer_hf.data import soma, store_checks, zarr_chunks
from geneformer_hf.data.readers import open_cells
from geneformer_hf.data.soma import SomaSource
from geneformer_hf.errors import CellFileError, GeneIdError, UnsafePickleError
from tests.conftest import make_cells, write
from tests.formats.files import write_soma, write_zarr

SECRET = np.arange(1.0, 31.0)


@pytest.fixture
def secret(tmp_path) -> Path:
    """Another file of this disk, whose content nobody asked for."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["values"] = SECRET
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    return path


def replace_obs_column(path: Path, put) -> Path:
    """Put something hostile in the place of obs['age'], a column of 30 numbers."""
    with h5py.File(path, "r+") as file:
        del file["obs/age"]
        put(file["obs"])
    return path


def external_link(obs, secret):
    obs["age"] = h5py.ExternalLink(str(secret), "/values")


def external_storage(obs, secret):
    obs.create_dataset("age", (30,), "f8", external=[(str(secret.with_suffix(".bin")), 0, h5py.h5f.UNLIMITED)])


def virtual_dataset(obs, secret):
    layout = h5py.VirtualLayout((30,), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "values", shape=(30,))
    obs.create_virtual_dataset("age", layout)


def soft_link_through_an_external_one(obs, secret):
    obs["door"] = h5py.ExternalLink(str(secret), "/")
    obs["age"] = h5py.SoftLink("/obs/door/values")


@pytest.mark.parametrize("put", [external_link, external_storage, virtual_dataset, soft_link_through_an_external_one], ids=lambda f: f.__name__)
def test_an_h5ad_that_reads_another_file_is_refused(put, secret, tmp_path, genes, tokenizer, model_folder, capsys):
    path = write(make_cells(genes, age=np.arange(30.0)), tmp_path / "cells.h5ad")
    replace_obs_column(path, lambda obs: put(obs, secret))
    for door in (open_cells, lambda p: load_cells(p, tokenizer=tokenizer, cache_dir=tmp_path), lambda p: stream_cells(p, tokenizer=tokenizer)):
        with pytest.raises(
            CellFileError, match=r"cells\.h5ad: 'obs/(age|door)' (is a link into another file|keeps its values in another|is a virtual dataset)"
        ):
            door(path)
    assert main(["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 1
    assert "Only data inside the file itself is read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_categories_behind_a_reference_are_looked_at_too(tmp_path, genes, secret):
    path = write(make_cells(genes, age=np.arange(30.0)), tmp_path / "cells.h5ad")

    def put(obs):
        obs["codes"] = np.zeros(30, dtype="i1")
        layout = h5py.VirtualLayout((30,), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "values", shape=(30,))
        # Reachable by its reference alone.
        hidden = obs.create_virtual_dataset("hidden", layout)
        obs["codes"].attrs["categories"] = hidden.ref
        obs.move("codes", "age")

    with pytest.raises(CellFileError, match="'obs/hidden' is a virtual dataset"):
        open_cells(replace_obs_column(path, put))


def test_filters_that_are_not_known_are_refused_by_number(tmp_path, genes):
    path = write(make_cells(genes), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((10,))
        # Optional, so that the file can be written where the filter is not there.
        creation.set_filter(32_001, h5py.h5z.FLAG_OPTIONAL, ())
        creation.set_filter(40_000, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"uns/odd", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((10,)), creation)
    with pytest.raises(CellFileError, match=r"'uns/odd' is compressed by (blosc, which needs the package hdf5plugin|the filter 40000)"):
        open_cells(path)


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_filters_of_ordinary_files_are_read(compression, tmp_path, genes, cells):
    cells.write_h5ad(tmp_path / "cells.h5ad", compression=compression)
    assert open_cells(tmp_path / "cells.h5ad").n_cells == 30


def test_chunks_larger_than_memory_are_refused_before_they_are_read(tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    metadata = json.loads((store / "X" / "data" / ".zarray").read_text())
    (store / "X" / "data" / ".zarray").write_text(json.dumps(metadata | {"chunks": [10**12], "shape": [10**12]}))
    with pytest.raises(CellFileError, match=r"X/data/\.zarray declares chunks of 4,000\.0 GB; expected chunks of at most 4\.3 GB"):
        open_cells(store)


def test_declared_numbers_of_cells_are_refused_before_allocation(tmp_path, genes):
    path = write(make_cells(genes), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        for name in ("obs/_index", "X/indptr"):
            del file[name]
        # Declared, and nowhere stored.
        file.create_dataset("obs/_index", (10**12,), h5py.string_dtype(), chunks=(1024,))
        file.create_dataset("X/indptr", (10**12 + 1,), "i8", chunks=(1024,))
        file["X"].attrs["shape"] = np.array([10**12, 60])
    start = time.monotonic()
    with pytest.raises(CellFileError, match=r"its index of 1,000,000,000,000 cells would take 16,000\.0 GB of memory; expected at most"):
        open_cells(path)
    assert time.monotonic() - start < 30


def empty_cells(file, n, **stored):
    """Declare so many cells without a gene."""
    for name in ("obs/_index", "X/indptr", "X/indices", "X/data"):
        del file[name]
    file.create_dataset("obs/_index", (n,), h5py.string_dtype(), **stored)
    file.create_dataset("X/indptr", (n + 1,), "i8", **stored)
    file["X/indices"], file["X/data"] = np.zeros(0, "i4"), np.zeros(0, "f4")
    file["X"].attrs["shape"] = np.array([n, 60])


@pytest.mark.parametrize("stored", [{"chunks": (1024,)}, {"chunks": (10**7,)}, {}], ids=["chunks", "one_chunk", "contiguous"])
def test_cells_that_are_declared_and_not_stored_are_refused(stored, tmp_path, genes):
    path = write(make_cells(genes), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        empty_cells(file, 10**7, **stored)
    with pytest.raises(CellFileError, match=r"cells\.h5ad: X/indptr declares 10,000,001 entries, and at most 0 are stored"):
        open_cells(path)


def test_texts_of_absurd_length_are_refused(tmp_path, genes):
    path = write(make_cells(genes, kind=["a"] * 30), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        del file["obs/_index"]
        file.create_dataset("obs/_index", (30,), "S100000000", chunks=(1,), compression="gzip")
    with pytest.raises(CellFileError, match=r"cells\.h5ad: obs/_index keeps 100,000,000 bytes for each of its texts; expected at most 65,536"):
        open_cells(path).cell_ids  # noqa: B018


def test_categories_behind_a_reference_to_nothing_are_refused(tmp_path, genes):
    path = write(make_cells(genes, age=np.arange(30)), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["obs/age"].attrs["categories"] = h5py.Reference()
    source = open_cells(path)
    with pytest.raises(CellFileError, match="Invalid HDF5 object reference"):
        source.read_obs(["age"])


class Canary:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("place", ["compressor", "filters", "inside_a_shard"])
def test_codecs_that_run_code_are_refused_by_name(version, place, tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", version)
    name = ".zarray" if version == 2 else "zarr.json"
    path = store / "obs" / "_index" / name
    metadata = json.loads(path.read_text())
    if version == 2:
        metadata |= {"compressor": {"id": "pickle", "protocol": 5}} if place == "compressor" else {"filters": [{"id": "pickle"}]}
    else:
        codec = {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}
        metadata["codecs"] = [codec] if place != "inside_a_shard" else [{"name": "sharding_indexed", "configuration": {"chunk_shape": [1], "codecs": [codec]}}]
    path.write_text(json.dumps(metadata))
    for chunk in [p for p in (store / "obs" / "_index").rglob("*") if p.is_file() and p.name != name and not p.name.startswith(".z")]:
        import pickle

        chunk.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(CellFileError, match=r"names the codec '(numcodecs\.)?pickle', which is not one of those that are read .* nothing of it was executed"):
        open_cells(store).read_obs([])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("version", [2, 3])
def test_stores_of_anndata_are_read(version, tmp_path, genes, cells):
    assert open_cells(write_zarr(cells, tmp_path / "cells.zarr", version)).cell_ids == list(cells.obs_names)


def test_symbolic_links_among_chunks_are_refused(tmp_path, genes, secret):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    chunk = next(p for p in (store / "X" / "data").iterdir() if not p.name.startswith("."))
    chunk.unlink()
    chunk.symlink_to(secret.with_suffix(".bin"))
    with pytest.raises(CellFileError, match=r"is a symbolic link .*secret\.bin\)\. Only data inside the folder itself is read"):
        open_cells(store)


@pytest.mark.parametrize("place", ["file", "chunk", "mtx", "table"])
def test_pipes_are_refused_at_once(place, tmp_path, genes, tokenizer):
    cells = make_cells(genes)
    if place == "file":
        path = tmp_path / "cells.h5ad"
        os.mkfifo(path)
    elif place == "chunk":
        path = write_zarr(cells, tmp_path / "cells.zarr", 2)
        os.mkfifo(path / "X" / "data" / "9")
    else:
        path = tenx_folder(cells, tmp_path / "cells")
        part = path / ("matrix.mtx" if place == "mtx" else "barcodes.tsv")
        part.unlink()
        os.mkfifo(part)
    start = time.monotonic()
    with pytest.raises(CellFileError, match=r"named pipe|no file of cells|neither a zarr store nor a 10x folder|has no barcodes"):
        load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert time.monotonic() - start < 20


def test_loops_of_links_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.h5ad").symlink_to(tmp_path / "b.h5ad")
    (tmp_path / "b.h5ad").symlink_to(tmp_path / "a.h5ad")
    with pytest.raises(CellFileError, match=r"a\.h5ad' cannot be opened: .*(symbolic links|loop)"):
        load_cells(tmp_path / "a.h5ad", tokenizer=tokenizer)


def tenx_folder(cells: anndata.AnnData, folder: Path) -> Path:
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(cells.X.T.astype(int)))
    (folder / "barcodes.tsv").write_text("\n".join(cells.obs_names) + "\n")
    (folder / "features.tsv").write_text("".join(f"{gene}\tS{i}\tGene Expression\n" for i, gene in enumerate(cells.var_names)))
    return folder


@pytest.mark.parametrize("name", ["barcodes.tsv", "features.tsv", "matrix.mtx"])
def test_a_gzip_file_that_unpacks_to_more_than_its_header_says_is_refused(name, tmp_path, genes):
    folder = tenx_folder(make_cells(genes), tmp_path / "cells")
    text = (folder / name).read_bytes()
    (folder / name).unlink()
    with gzip.open(folder / f"{name}.gz", "wb") as file:
        file.write(text.rstrip(b"\n"))
        # One line of 200 MB in a file of 200 kB.
        for _ in range(200):
            file.write(b"1" * (1 << 20))
    with pytest.raises(CellFileError, match=r"unpacks to a line of more than 65,536 bytes, which does not fit the size in its header"):
        source = open_cells(folder)
        list(source.iter_blocks())


def test_many_lines_more_than_the_header_says_are_refused(tmp_path, genes):
    folder = tenx_folder(make_cells(genes), tmp_path / "cells")
    text = (folder / "barcodes.tsv").read_bytes()
    (folder / "barcodes.tsv").unlink()
    with gzip.open(folder / "barcodes.tsv.gz", "wb") as file:
        file.write(text)
        for _ in range(50):
            file.write(b"\n" * (1 << 20))
    with pytest.raises(CellFileError, match=r"unpacks to more than .* bytes of text, which does not fit the size in its header"):
        open_cells(folder)


@pytest.mark.parametrize("size", ["60 30 99999999999", "60 30 -1", "-60 -30 10"])
def test_a_matrix_of_more_entries_than_it_holds_is_refused(size, tmp_path, genes):
    folder = tenx_folder(make_cells(genes), tmp_path / "cells")
    lines = (folder / "matrix.mtx").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    (folder / "matrix.mtx").write_text("\n".join([*lines[:place], size, *lines[place + 1 :]]))
    with pytest.raises(CellFileError, match="more than they hold or fewer than none"):
        open_cells(folder)


def test_labels_of_an_scdl_archive_are_not_unpickled(tmp_path, genes):
    pytest.importorskip("bionemo.scdl", reason="needs bionemo-scdl")
    from geneformer_hf import write_scdl

    archive = write_scdl(open_cells(make_cells(genes)), tmp_path / "archive")
    assert open_cells(archive).n_cells == 30
    for labels in archive.rglob("labels.npy"):
        np.save(labels, np.array([Canary(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(UnsafePickleError, match=r"labels\.npy: the pickle asks for pathlib.*nothing of it was executed"):
        open_cells(archive)
    assert not (tmp_path / "ran").exists()


def bomb(codec: str, n_bytes: int) -> bytes:
    """Zeros that a codec makes much smaller."""
    if codec == "zstd, no size":
        # A stream declares nothing beforehand.
        with pa.BufferOutputStream() as sink:
            with pa.CompressedOutputStream(sink, "zstd") as packer:
                packer.write(bytes(n_bytes))
            return sink.getvalue().to_pybytes()
    return bytes(numcodecs.get_codec({"id": codec}).encode(bytes(n_bytes)))


@pytest.mark.parametrize("codec", ["gzip", "zlib", "bz2", "lzma", "zstd", "zstd, no size", "blosc", "lz4"])
@pytest.mark.parametrize("key", ["X/data", "var/_index"])
def test_chunks_that_unpack_to_more_than_they_declare_are_refused(codec, key, tmp_path, genes, monkeypatch):
    monkeypatch.setattr(zarr_chunks, "UNPACKED_FROM", dict.fromkeys(zarr_chunks.UNPACKED_FROM, 1))
    monkeypatch.setattr(zarr_chunks, "MOST_CHUNK_BYTES", 1 << 20)
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    path = store / key / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compressor": {"id": codec.split(",")[0]}}))
    (store / key / "0").write_bytes(bomb(codec, 8 << 20))
    with pytest.raises(CellFileError, match=rf"the chunk {key}/0 unpacks from [\d,]+ bytes to more than [\d,]+"):
        open_cells(store)


def sharded(store: Path, *, index_first: bool = False, codec: str = "zstd") -> tuple[Path, np.ndarray]:
    """Write X/data of a store again as one shard of chunks of 128 values; return its file and its values."""
    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    values, attributes = group["X/data"][:], dict(group["X/data"].attrs)
    del group["X/data"]
    n = -(-len(values) // 128) * 128
    codecs = {"zstd": zarr.codecs.ZstdCodec, "gzip": zarr.codecs.GzipCodec, "blosc": zarr.codecs.BloscCodec}
    sharding = zarr.codecs.ShardingCodec(
        chunk_shape=(128,), codecs=[zarr.codecs.BytesCodec(), codecs[codec]()], index_location="start" if index_first else "end"
    )
    array = zarr.create_array(
        store=str(store), name="X/data", shape=values.shape, chunks=(n,), dtype=values.dtype, serializer=sharding, compressors=None, attributes=attributes
    )
    array[:] = values
    return next(p for p in (store / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json"), values


def with_bomb(shard: bytes, n_chunks: int, packed: bytes, *, index_first: bool) -> bytes:
    """Put other bytes in the place of the second chunk of a shard, whose index has a checksum of four bytes."""
    size = 16 * n_chunks + 4
    index = np.frombuffer(shard[:size][:-4] if index_first else shard[-size:-4], dtype="<u8").reshape(-1, 2).copy()
    index[1] = len(shard) if index_first else len(shard) - size, len(packed)
    sealed = bytes(numcodecs.get_codec({"id": "crc32c", "location": "end"}).encode(index.tobytes()))
    return sealed + shard[size:] + packed if index_first else shard[:-size] + packed + sealed


@pytest.mark.parametrize("index_first", [False, True], ids=["index_last", "index_first"])
@pytest.mark.parametrize("codec", ["zstd", "zstd, no size", "gzip", "blosc"])
def test_chunks_in_shards_are_looked_at_too(codec, index_first, tmp_path, genes, monkeypatch):
    monkeypatch.setattr(zarr_chunks, "UNPACKED_FROM", dict.fromkeys(zarr_chunks.UNPACKED_FROM, 1))
    cells = make_cells(genes)
    store = write_zarr(cells, tmp_path / "cells.zarr", 3)
    before = next(iter(open_cells(store).iter_blocks(0, 30))).counts_ng.toarray()
    shard, values = sharded(store, index_first=index_first, codec=codec.split(",")[0])
    assert (next(iter(open_cells(store).iter_blocks(0, 30))).counts_ng.toarray() == before).all()
    packed = bomb(codec, 8 << 20) if codec != "blosc" else bytes(numcodecs.Blosc().encode(np.zeros(2 << 20, "f4")))
    whole = with_bomb(shard.read_bytes(), -(-len(values) // 128), packed, index_first=index_first)
    shard.write_bytes(whole)
    with pytest.raises(CellFileError, match=r"the chunk X/data/c/0 (unpacks from [\d,]+ bytes to more than|has [\d,]+ bytes for) [\d,]+"):
        open_cells(store)
    shard.write_bytes(whole[:100])
    with pytest.raises(CellFileError, match=r"the chunk X/data/c/0 has 100 bytes, (fewer than the index|and its index names chunks beyond)"):
        open_cells(store)


def test_shards_laid_out_in_another_way_are_refused(tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 3)
    sharded(store)
    path = store / "X" / "data" / "zarr.json"
    metadata = json.loads(path.read_text())
    settings = next(codec for codec in metadata["codecs"] if codec["name"] == "sharding_indexed")["configuration"]
    for changes in ({"chunk_shape": [0]}, {"chunk_shape": "all"}, {"index_codecs": [{"name": "gzip"}]}, {"codecs": [{"name": "sharding_indexed"}]}):
        kept = dict(settings)
        settings |= changes
        path.write_text(json.dumps(metadata))
        settings.clear()
        settings |= kept
        with pytest.raises(CellFileError, match=r"X/data/zarr\.json lays out its shards in a way that is not read"):
            open_cells(store)


def put_chunk(path: Path, content: bytes, n_filters: int) -> None:
    """Put bytes in the place of X/data, whose values then are whatever they unpack to."""
    with h5py.File(path, "r+") as file:
        n = file["X/data"].shape[0]
        del file["X/data"]
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((n,))
        for _ in range(n_filters):
            creation.set_deflate(9)
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((n,)), creation)
        file["X/data"].id.write_direct_chunk((0,), content)


def test_hdf5_chunks_larger_than_their_values_are_refused(h5ad):
    put_chunk(h5ad, bytes(1 << 20), 1)
    with pytest.raises(CellFileError, match=r"'X/data' has 1,048,576 bytes for [\d,]+ bytes of values"):
        open_cells(h5ad)


def test_hdf5_chunks_that_unpack_to_more_than_they_declare_are_refused(h5ad, monkeypatch):
    put_chunk(h5ad, zlib.compress(bytes(8 << 20), 9), 1)
    # Small enough to be read as it is, by default.
    assert open_cells(h5ad).n_cells == 30
    store_checks._checked.clear()
    monkeypatch.setitem(zarr_chunks.UNPACKED_FROM, "zlib", 1)
    with pytest.raises(CellFileError, match=r"'X/data' has a chunk that unpacks from 8,1\d\d bytes to more than \d\d,\d\d\d, eight times what it declares"):
        open_cells(h5ad)


def test_large_chunks_of_ordinary_files_are_read(tmp_path, genes, monkeypatch):
    monkeypatch.setitem(zarr_chunks.UNPACKED_FROM, "zlib", 1)
    cells = make_cells(genes)
    path = tmp_path / "cells.h5ad"
    write(cells, path)
    with h5py.File(path, "r+") as file:
        for name in ("X/data", "X/indices"):
            values = file[name][:]
            del file[name]
            file.create_dataset(name, data=values, chunks=values.shape, compression="gzip", shuffle=True, fletcher32=True)
    assert (next(iter(open_cells(path).iter_blocks(0, 30))).counts_ng.toarray() == cells.X.toarray()).all()


def test_hdf5_chunks_compressed_twice_are_refused(h5ad):
    put_chunk(h5ad, gzip.compress(b"x"), 2)
    with pytest.raises(CellFileError, match="'X/data' is compressed more than once"):
        open_cells(h5ad)


@pytest.mark.parametrize("place", ["obs", "/", "layers"])
def test_names_that_are_no_text_are_refused(place, h5ad):
    with h5py.File(h5ad, "r+") as file:
        file.require_group(place).create_dataset(b"c\xff\xfe", data=np.arange(30))
    with pytest.raises(CellFileError, match=r"a name in it is not text in UTF-8|broke off|cannot be read"):
        open_cells(h5ad)


def test_a_line_of_tabs_does_not_fill_memory(tmp_path):
    folder = tmp_path / "tenx"
    folder.mkdir()
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2000 30 1\n1 1 1\n")
    (folder / "features.tsv").write_bytes((b"\t" * 4000 + b"\n") * 2000)
    (folder / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(30)))
    tracemalloc.start()
    with pytest.raises((CellFileError, GeneIdError)):
        open_cells(folder)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_chunks_larger_than_their_values_are_refused(tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 3)
    chunk = next(p for p in (store / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(bytes(1 << 20))
    with pytest.raises(CellFileError, match=r"the chunk X/data/.* has 1,048,576 bytes for [\d,]+ bytes of values"):
        open_cells(store)


def test_chunks_compressed_twice_are_refused(tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    path = store / "X" / "data" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"filters": [{"id": "gzip"}], "compressor": {"id": "gzip"}}))
    with pytest.raises(CellFileError, match=r"compresses its chunks 2 times \(gzip, gzip\); expected once"):
        open_cells(store)


@pytest.mark.parametrize("codec", ["gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"])
def test_chunks_of_every_size_are_read(codec, tmp_path, genes, monkeypatch):
    monkeypatch.setattr(zarr_chunks, "UNPACKED_FROM", dict.fromkeys(zarr_chunks.UNPACKED_FROM, 1))
    cells = make_cells(genes)
    store = write_zarr(cells, tmp_path / "cells.zarr", 2)
    before = next(iter(open_cells(store).iter_blocks(0, 30))).counts_ng.toarray()
    array = zarr.open(store)["X/data"]
    values = array[:]
    path = store / "X" / "data" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compressor": {"id": codec}, "filters": None}))
    (store / "X" / "data" / "0").write_bytes(bytes(numcodecs.get_codec({"id": codec}).encode(values.tobytes())))
    assert (next(iter(open_cells(store).iter_blocks(0, 30))).counts_ng.toarray() == before).all()


@pytest.mark.parametrize("content", ["[]", "[" * 200_000, ""], ids=["list", "deep", "empty"])
def test_the_metadata_of_an_scdl_archive_is_an_object(content, tmp_path, genes):
    pytest.importorskip("bionemo.scdl", reason="needs bionemo-scdl")
    from geneformer_hf import write_scdl

    archive = write_scdl(open_cells(make_cells(genes)), tmp_path / "archive")
    (archive / "metadata.json").write_text(content)
    with pytest.raises(CellFileError, match=r"metadata\.json (holds a JSON list|nests|cannot be read)"):
        open_cells(archive)


def test_sizes_that_the_headers_of_an_scdl_archive_declare_are_checked(tmp_path, genes):
    pytest.importorskip("bionemo.scdl", reason="needs bionemo-scdl")
    from geneformer_hf import write_scdl

    archive = write_scdl(open_cells(make_cells(genes)), tmp_path / "archive")
    path = next(p for p in archive.rglob("*.npy") if p.read_bytes()[:6] == b"\x93NUMPY" and p.name != "labels.npy")
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (10**12,), "fortran_order": False, "descr": "<i8"})
    with pytest.raises(CellFileError, match=r"its header declares 8,000,000,000,000 bytes of values, more than the file has"):
        open_cells(archive)


def test_links_in_an_scdl_archive_are_refused(tmp_path, genes):
    pytest.importorskip("bionemo.scdl", reason="needs bionemo-scdl")
    from geneformer_hf import write_scdl

    archive = write_scdl(open_cells(make_cells(genes)), tmp_path / "archive")
    shutil.move(archive / "data.npy", tmp_path / "data.npy")
    (archive / "data.npy").symlink_to(tmp_path / "data.npy")
    with pytest.raises(CellFileError, match=r"data\.npy is a symbolic link"):
        open_cells(archive)


@pytest.mark.parametrize("codec", [["pickle"], {"a": 1}, 5, None, "Pickle", "numcodecs.numcodecs.pickle"], ids=str)
def test_codecs_of_another_shape_are_refused(codec, tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    path = store / "X" / "data" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"filters": [{"id": codec}]}))
    with pytest.raises(CellFileError, match=r"X/data/\.zarray names the codec"):
        open_cells(store)


def test_a_store_that_declares_what_is_not_there_is_refused_soon(tmp_path, genes):
    store = write_zarr(make_cells(genes), tmp_path / "cells.zarr", 2)
    path = store / "var" / "_index" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [31_000_000]}))
    start = time.monotonic()
    with pytest.raises(CellFileError, match=r"var/_index declares 516,667 chunks, and 1 are there"):
        open_cells(store)
    assert time.monotonic() - start < 20


def test_columns_that_are_listed_twice_are_refused(tmp_path, genes):
    path = write(make_cells(genes), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["column-order"] = np.array(["cell_type"] * 50, dtype=object)
    with pytest.raises(CellFileError, match="obs lists columns more than once"):
        open_cells(path).obs_columns  # noqa: B018 - it is read then


@pytest.mark.parametrize("name", ["/X/data", "../X/data"])
def test_columns_that_are_paths_out_of_the_table_are_refused(name, h5ad):
    with h5py.File(h5ad, "r+") as file:
        file["obs"].attrs["column-order"] = [name]
    with pytest.raises(CellFileError, match="obs lists columns that are not there"):
        open_cells(h5ad)


SOMA_PARTS = [("", "obs"), ("ms/RNA", "var"), ("ms/RNA/X", "raw")]


@pytest.mark.parametrize(("parent", "name"), SOMA_PARTS, ids=[name for _, name in SOMA_PARTS])
def test_parts_of_an_experiment_that_lie_elsewhere_are_refused(parent, name, genes, tmp_path):
    import tiledbsoma

    place, other = (write_soma(make_cells(genes), tmp_path / folder) for folder in ("an experiment", "another"))
    opened = tiledbsoma.open(str(other / parent / name))
    with tiledbsoma.open(str(place / parent), "d") as group:
        del group[name]
    with tiledbsoma.open(str(place / parent), "w") as group:
        group.set(name, opened, use_relative_uri=False)
    with pytest.raises(CellFileError, match=rf"an experiment: '{name}' lies outside of the experiment, at file://.*another/.*{name}\. Only data inside"):
        SomaSource(place)
    assert SomaSource(other).n_cells == 30


def test_links_and_pipes_in_an_experiment_are_refused(genes, tmp_path):
    place, other = (write_soma(make_cells(genes), tmp_path / folder) for folder in ("experiment", "another"))
    shutil.rmtree(place / "obs")
    (place / "obs").symlink_to(other / "obs")
    with pytest.raises(CellFileError, match="obs is a symbolic link"):
        SomaSource(place)
    (place / "obs").unlink()
    os.mkfifo(place / "obs")
    with pytest.raises(CellFileError, match="obs is a named pipe"):
        SomaSource(place)


@pytest.mark.parametrize(("address", "root", "outside"), [
    ("s3://bucket/census/homo_sapiens/obs", "s3://bucket/census/homo_sapiens", False),
    ("s3://bucket/census/homo_sapiens_2/obs", "s3://bucket/census/homo_sapiens", True),
    ("s3://bucket/census/homo_sapiens/../obs", "s3://bucket/census/homo_sapiens", True),
    ("file:///data/secret/obs", "s3://bucket/census/homo_sapiens", True),
    ("s3://bucket/obs", "/data/experiment", True),
    ("file:///data/experiment/../secret/obs", "/data/experiment", True),
    ("s3://bucket/7c1f/obs", "tiledb://someone/experiment", False),
])  # fmt: skip
def test_addresses_outside_of_an_experiment(address, root, outside):
    assert soma._is_outside(address, root) is outside


def test_experiments_that_lack_a_part_are_refused(genes, tmp_path):
    import tiledbsoma

    place = write_soma(make_cells(genes), tmp_path / "experiment")
    with tiledbsoma.open(str(place), "d") as experiment:
        del experiment["obs"]
    with pytest.raises(CellFileError, match=r"has no 'obs'\. Found: ms"):
        SomaSource(place)
