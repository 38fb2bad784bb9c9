"""From a file of cells to a saved dataset: this package against the published way, written naively, in one run.

    python benchmarks/bench_tokenize.py [--cells 10000] [--layouts csr,gzip,dense,csc] [--memory]

The published way: per 512 cells sparse products, an argsort per cell, a Python list of arrays, `Dataset.from_dict`, and
`map` to crop. The cells are generated: about 3,000 detected genes of 33,000, over a V1-sized table of 25,424 genes.
Every timed run is a process of its own; the time is from file to saved dataset and leaves out the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

N_GENES, N_VOCABULARY = 33_000, 25_424
BAR_TWO_CORES, BAR_ONE_CORE = 5.0, 3.0


def gene_names() -> list[str]:
    return [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]


def write_cells(path: Path, n_cells: int, layout: str, seed: int = 0) -> None:
    """Write cells in parts, so that making 50,000 of them takes little memory either."""
    import anndata
    import h5py
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 2, N_GENES)
    cumulative = np.cumsum(weights / weights.sum())
    parts = []
    for start in range(0, n_cells, 1000):
        rows = []
        for _ in range(min(1000, n_cells - start)):
            drawn = np.searchsorted(cumulative, rng.random(int(rng.normal(9500, 1500))))
            genes, counts = np.unique(drawn, return_counts=True)
            rows.append((genes.astype(np.int32), counts.astype(np.float32)))
        indptr = np.concatenate(([0], np.cumsum([len(g) for g, _ in rows])))
        parts.append(sp.csr_matrix((np.concatenate([c for _, c in rows]), np.concatenate([g for g, _ in rows]), indptr), shape=(len(rows), N_GENES)))
    counts = sp.vstack(parts, format="csr")
    obs = pd.DataFrame({"n_counts": np.asarray(counts.sum(1)).ravel()}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame({"ensembl_id": gene_names()}, index=[f"g{i}" for i in range(N_GENES)])
    if layout == "dense":
        anndata.AnnData(obs=obs, var=var).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            if "X" in file:
                del file["X"]
            dense = file.create_dataset("X", (n_cells, N_GENES), "f4", chunks=(64, N_GENES))
            dense.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for start in range(0, n_cells, 512):
                dense[start : start + 512] = counts[start : start + 512].toarray()
        return
    matrix = counts.tocsc() if layout == "csc" else counts
    anndata.AnnData(matrix, obs, var).write_h5ad(path, compression="gzip" if layout == "gzip" else None)


def table() -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(N_GENES, N_VOCABULARY, replace=False))
    names = gene_names()
    return [names[i] for i in chosen], rng.lognormal(1, 0.8, N_VOCABULARY)


def run_published_way(path: Path, output: Path) -> None:
    import anndata
    import scipy.sparse as sp
    from datasets import Dataset

    ids, medians = table()
    adata = anndata.read_h5ad(path)
    token_of = {g: i + 2 for i, g in enumerate(ids)}
    median_of = dict(zip(ids, medians, strict=True))
    known = [i for i, g in enumerate(adata.var["ensembl_id"]) if g in token_of]
    genes = adata.var["ensembl_id"].to_numpy()[known]
    tokens = np.array([token_of[g] for g in genes])
    factors = sp.csr_matrix(1.0 / np.array([median_of[g] for g in genes]))
    cells = []
    for start in range(0, adata.n_obs, 512):
        block = sp.csr_matrix(adata[start : start + 512, known].X)
        totals = adata.obs["n_counts"].to_numpy()[start : start + 512, None]
        scaled = sp.csr_matrix((block / totals * 10_000).multiply(factors))
        cells += [tokens[scaled[i].indices[np.argsort(-scaled[i].data)]] for i in range(scaled.shape[0])]
    dataset = Dataset.from_dict({"input_ids": cells, "cell": list(adata.obs_names)})
    dataset = dataset.map(lambda row: {"input_ids": row["input_ids"][:2048], "length": min(len(row["input_ids"]), 2048)})
    dataset.save_to_disk(output)


def run_ours(path: Path, output: Path, num_proc: int) -> None:
    from geneformer_hf import GeneformerTokenizer, GeneTable, load_cells

    ids, medians = table()
    tokenizer = GeneformerTokenizer(gene_table=GeneTable(ids, range(2, len(ids) + 2), medians))
    load_cells(path, tokenizer=tokenizer, obs="none", num_proc=num_proc if num_proc > 1 else None, cache_dir=output / "cache").save_to_disk(output / "dataset")


def child(way: str, path: Path, num_proc: int) -> None:
    import datasets

    import geneformer_hf.data.builder  # noqa: F401 - imported before the clock starts, as datasets is for the published way

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        memory = PeakMemory()
        memory.start()
        start = time.perf_counter()
        run_published_way(path, Path(folder) / "out") if way == "published" else run_ours(path, Path(folder), num_proc)
        seconds = time.perf_counter() - start
    memory.done.set()
    print(json.dumps({"seconds": seconds, "peak_mb": (memory.peak - memory.before) / 1024}))


class PeakMemory(threading.Thread):
    """Samples the anonymous memory of this process; pages of mapped files, which the system takes back at will, do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now_kb()
        self.done = threading.Event()

    @staticmethod
    def now_kb() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.now_kb())


def measure(way: str, path: Path, cores: int = 2, num_proc: int = 1, repeats: int = 3) -> tuple[float, float]:
    results = []
    for _ in range(repeats):
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", way, "--file", str(path), "--num-proc", str(num_proc)]
        if cores == 1:
            command = ["taskset", "-c", "0", *command]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return float(np.median([r["seconds"] for r in results])), max(r["peak_mb"] for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--layouts", default="csr,gzip,dense,csc")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory for five times as many cells")
    parser.add_argument("--child", choices=("published", "ours"))
    parser.add_argument("--file", type=Path)
    parser.add_argument("--num-proc", type=int, default=1)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.file, args.num_proc)
        return
    with tempfile.TemporaryDirectory() as folder:
        ratios = {}
        print(f"{'layout':8} {'way':30} {'seconds':>8} {'ratio':>6} {'peak MB above import':>21}")
        for layout in filter(None, args.layouts.split(",")):
            path = Path(folder) / f"{layout}.h5ad"
            write_cells(path, args.cells, layout)
            for cores, num_proc in ((1, 1), (2, 1), (2, 2)):
                if num_proc == 1:
                    published, peak = measure("published", path, cores, repeats=3 if layout == "csr" else 1)
                    print(f"{layout:8} {f'published way, {cores} core(s)':30} {published:8.2f} {1:6.1f} {peak:21.0f}")
                seconds, peak = measure("ours", path, cores, num_proc)
                ratios[layout, cores] = max(published / seconds, ratios.get((layout, cores), 0.0))
                print(f"{layout:8} {f'ours, {cores} core(s), num_proc={num_proc}':30} {seconds:8.2f} {published / seconds:6.1f} {peak:21.0f}", flush=True)
            path.unlink()
        if args.memory:
            peaks = []
            for n_cells in (args.cells, 5 * args.cells):
                path = Path(folder) / "memory.h5ad"
                write_cells(path, n_cells, "csr")
                peaks.append(measure("ours", path, repeats=3)[1])
                path.unlink()
                print(f"peak MB above import for {n_cells:,} cells: {peaks[-1]:.0f}")
            print(
                json.dumps(
                    {
                        "claim": "peak memory of tokenizing does not grow with the file (5 times the cells)",
                        "ratio": peaks[1] / peaks[0],
                        "bar": 1.1,
                        "holds": peaks[1] <= 1.1 * peaks[0] and max(peaks) < 600,
                    }
                )
            )
        if ("csr", 1) in ratios:
            print(
                json.dumps(
                    {
                        "claim": "tokenizing on one core against the published way",
                        "ratio": ratios["csr", 1],
                        "bar": BAR_ONE_CORE,
                        "holds": ratios["csr", 1] >= BAR_ONE_CORE,
                    }
                )
            )
            print(
                json.dumps(
                    {
                        "claim": "tokenizing on two cores against the published way",
                        "ratio": ratios["csr", 2],
                        "bar": BAR_TWO_CORES,
                        "holds": ratios["csr", 2] >= BAR_TWO_CORES,
                    }
                )
            )


if __name__ == "__main__":
    main()
