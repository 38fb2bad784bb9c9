"""A million cells in flat memory."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import anndata
import datasets
import h5py
import numpy as np
import pytest

from geneformer_hf.data.readers import open_cells
from geneformer_hf.data.scdl import write_scdl
from geneformer_hf.data.writing import add_obs
from tests.conftest import write
from tests.formats import files as formats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write_many(path: Path, n_cells: int, genes: list[str]) -> None:
    """A sparse file, written in parts: eight genes a cell, a column of classes with gaps."""
    import pandas as pd

    step, rng = 100_000, np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        anndata.io.write_elem(file, "/", {})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        anndata.io.write_elem(file, "var", pd.DataFrame(index=genes))
        anndata.io.write_elem(file, "obs", pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]))
        codes = pd.Categorical.from_codes(rng.integers(-1, 5, n_cells), [f"type{i}" for i in range(5)])
        add_obs(file, {"cell_type": pd.Series(codes)})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n_cells, len(genes)])})
        data, indices = x.create_dataset("data", (n_cells * 8,), "f4"), x.create_dataset("indices", (n_cells * 8,), "i4")
        for start in range(0, n_cells * 8, step * 8):
            stop = min(start + step * 8, n_cells * 8)
            data[start:stop] = rng.integers(1, 9, stop - start)
            indices[start:stop] = np.sort(rng.permuted(np.tile(np.arange(len(genes)), ((stop - start) // 8, 1)), axis=1)[:, :8], axis=1).ravel()
        x["indptr"] = np.arange(n_cells + 1, dtype=np.int64) * 8


LOAD_SOMA = """
import sys
from geneformer_hf import GeneformerTokenizer, SomaSource, load_cells
experiment, model, output, cache = sys.argv[1:]
dataset = load_cells(SomaSource(experiment), tokenizer=GeneformerTokenizer.from_pretrained(model), cache_dir=cache)
assert len(dataset) == int(output.rsplit("out", 1)[1])
"""


def peak_of(command: list[str]) -> float:
    """Run a command and return the peak of its anonymous memory in MB; pages of mapped files do not count."""
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            try:
                lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
            except OSError:
                return
            peak.append(max((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), default=0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = run.communicate()
    done.set()
    watcher.join()
    assert run.returncode == 0, said
    return max(peak) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_million_cells_take_the_memory_of_a_hundred_thousand(tmp_path, genes, model_folder):
    peaks = {}
    for n_cells in (100_000, 1_000_000):
        path, output = tmp_path / f"{n_cells}.h5ad", tmp_path / f"tokens{n_cells}"
        write_many(path, n_cells, genes)
        peaks[n_cells] = peak_of([sys.executable, "-m", "geneformer_hf.cli.main", "tokenize", str(path), "--model", str(model_folder), "--output", str(output)])
        dataset = datasets.load_from_disk(str(output))
        assert len(dataset) == n_cells
        assert dataset[n_cells - 1]["cell_id"] == f"cell{n_cells - 1}"
    # What grows is 8 bytes a cell for row pointers and 8 for the check of cell ids, each copied a few times.
    assert peaks[1_000_000] - peaks[100_000] < 0.9 * 80
    assert peaks[1_000_000] < 1.2 * peaks[100_000]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["csc", "dense", "zarr", "loom", "tenx", "folder", "scdl", "soma"])
def test_every_kind_of_file_is_read_in_flat_memory(kind, tmp_path, genes, model_folder):
    """The counts of 180,000 more cells would take 43 MB dense and 17 MB sparse, and several times that on the way."""
    peaks = []
    # Writing an experiment takes longer than everything else.
    for n_cells in (10_000, 100_000) if kind == "soma" else (20_000, 200_000):
        write_many(tmp_path / "source.h5ad", n_cells, genes)
        cells = anndata.read_h5ad(tmp_path / "source.h5ad")
        make = {
            "csc": lambda c, p: write(c, p.with_suffix(".h5ad"), "csc"),
            "dense": lambda c, p: write(c, p.with_suffix(".h5ad"), "dense"),
            "zarr": lambda c, p: formats.write_zarr(c, p.with_suffix(".zarr"), 3),
            "loom": lambda c, p: formats.write_loom(c, p.with_suffix(".loom")),
            "tenx": lambda c, p: formats.write_tenx_h5(c, p.with_suffix(".h5")),
            "folder": formats.write_tenx_folder,
            "scdl": lambda c, p: write_scdl(open_cells(c), p),
            "soma": formats.write_soma,
        }
        path = make[kind](cells, tmp_path / f"n{n_cells}")
        del cells
        command = ["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / f"out{n_cells}")]
        if kind == "soma":
            peaks.append(
                peak_of([sys.executable, "-c", LOAD_SOMA, str(path), str(model_folder), str(tmp_path / f"out{n_cells}"), str(tmp_path / f"cache{n_cells}")])
            )
            continue
        # Buffers that fill with the smaller file already: what grows after that, grows with the file.
        code = "import sys; from geneformer_hf.data import tenx, transpose; transpose.CHUNK_VALUES = tenx.CHUNK_VALUES = 1 << 17; from geneformer_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"
        peaks.append(peak_of([sys.executable, "-c", code, *command]))
        assert len(datasets.load_from_disk(str(tmp_path / f"out{n_cells}"))) == n_cells
    assert peaks[1] - peaks[0] < 60, peaks
