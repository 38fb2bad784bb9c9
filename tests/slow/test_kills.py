"""Killed at any moment, the same command goes on and writes the same bytes: one process, several, a Dask cluster."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pandas as pd
import psutil
import pytest
from datasets import load_from_disk

from geneformer_hf import QualityRules, assess_quality, fit_gene_table, tokenize_corpus
from geneformer_hf.data import corpus
from geneformer_hf.data.tasks import open_workers
from tests.conftest import make_cells, write
from tests.faults.test_corpus import content_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, genes):
    folder = tmp_path_factory.mktemp("corpus")
    for i, layout in enumerate(("csr", "csc", "gzip", "dense", "csr", "gzip")):
        cells = make_cells(genes, 9_000, seed=i)
        cells.obs_names = [f"{i}-{name}" for name in cells.obs_names]
        write(cells, folder / f"{i}.h5ad", layout)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files, tokenizer):
    tokenize_corpus(files, tmp_path_factory.mktemp("whole") / "out", tokenizer=tokenizer)
    return content_of(next(tmp_path_factory.getbasetemp().glob("whole*/out")))


def start(files: Path, model: Path, output: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "geneformer_hf.cli.main", "tokenize", str(files), "--model", str(model), "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished_parts(output: Path) -> int:
    return len(list(output.parent.glob(f".{output.name}.unfinished/parts/[!.]*")))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


@pytest.mark.parametrize("options", [(), ("--num-proc", "2"), ("--dask", "local", "--num-proc", "2")], ids=["one", "processes", "dask"])
def test_sigkill_at_random_moments(options, tmp_path, files, model_folder, whole):
    rng, output = random.Random(len(options)), tmp_path / "out"
    moments, n_parts = [], 6 * 8
    for _ in range(3):
        run = start(files, model_folder, output, *options)
        children = psutil.Process(run.pid)
        moment = rng.randint(0, n_parts // 2)
        wait_for(lambda run=run, moment=moment: finished_parts(output) >= moment or run.poll() is not None)
        time.sleep(rng.random() * 0.05)
        workers = children.children(recursive=True) if run.poll() is None else []
        run.send_signal(signal.SIGKILL)
        run.communicate()
        moments.append(finished_parts(output))
        assert not output.exists() or run.returncode == 0
        # Nobody goes on writing behind the back of the next run.
        wait_for(lambda workers=workers: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), 60)
    last = start(files, model_folder, output, *options)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0 or "exists" in said, said
    assert content_of(output) == whole
    assert max(moments) > 0, "it was never killed in the middle"
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_dask_worker_costs_only_its_task(tmp_path, files, tokenizer, whole, monkeypatch):
    """Two real workers, one of them killed while parts are written: the run ends by itself, with the same bytes."""
    killed = []

    def killing(num_proc, dask):
        workers = open_workers(num_proc, dask)

        class Watched:
            def __enter__(self):
                inner = workers.__enter__()
                run = inner.run

                def run_and_kill(function, tasks, **options):
                    results = run(function, tasks, **options)
                    for done in results:
                        if options["label"] == "Tokenizing" and not killed:
                            killed.append(next(iter(inner._client.run(os.getpid).values())))
                            os.kill(killed[0], signal.SIGKILL)
                        yield done

                inner.run = run_and_kill
                return inner

            def __exit__(self, *error):
                return workers.__exit__(*error)

        return Watched()

    monkeypatch.setattr(corpus, "open_workers", killing)
    tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer, dask="local", num_proc=2)
    assert killed
    assert content_of(tmp_path / "out") == whole


def test_a_killed_process_of_a_pool_is_said_and_the_next_run_goes_on(tmp_path, files, model_folder, whole):
    output = tmp_path / "out"
    run = start(files, model_folder, output, "--num-proc", "2")
    wait_for(lambda: finished_parts(output) >= 3)
    spawned = [p for p in psutil.Process(run.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    os.kill(spawned[0].pid, signal.SIGKILL)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "A worker process died" in said
    assert "Traceback" not in said
    assert "Finished parts are kept" in said
    again = start(files, model_folder, output)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert content_of(output) == whole


def test_medians_and_quality_on_dask_are_those_of_one_process(tmp_path, files):
    """Two real workers; the table, the verdicts and the summary are the same bytes."""
    rules = QualityRules(max_doublet_score=0.2)
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for name in ("0.h5ad", "1.h5ad"):
        cells = anndata.read_h5ad(files / name)[:700].copy()
        write(cells, smaller / name, "csc" if name == "1.h5ad" else "csr")
    assert fit_gene_table(files, dask="local", num_proc=2).to_json() == fit_gene_table(files).to_json()
    one, cluster = assess_quality(smaller, rules=rules), assess_quality(smaller, rules=rules, dask="local", num_proc=2)
    assert one.summary.to_csv() == cluster.summary.to_csv()
    for name in one.files:
        assert one.cells(name).to_csv() == cluster.cells(name).to_csv()


@pytest.mark.parametrize("command", ["medians", "qc"])
def test_medians_and_quality_go_on_after_sigkill(command, tmp_path, files):
    output, whole = tmp_path / "out", tmp_path / "whole"
    line = [sys.executable, "-m", "geneformer_hf.cli.main", command, str(files), *(["--no-doublets"] if command == "qc" else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*line, "--output", str(whole)], check=True, capture_output=True, env=env)
    run = subprocess.Popen([*line, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    wait_for(lambda: finished_parts(output) >= 2 or run.poll() is not None)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert run.returncode == -signal.SIGKILL
    assert finished_parts(output) >= 2
    assert not output.exists()
    subprocess.run([*line, "--output", str(output)], check=True, capture_output=True, env=env)
    if output.is_dir():
        # HDF5 files hold time stamps of their own; what anndata reads of them counts.
        assert {n: c for n, c in content_of(output).items() if n.endswith(".csv")} == {n: c for n, c in content_of(whole).items() if n.endswith(".csv")}
        for path in sorted(whole.glob("*.h5ad")):
            pd.testing.assert_frame_equal(anndata.read_h5ad(output / path.name).obs, anndata.read_h5ad(path).obs)
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".out*"))


def test_a_dask_cluster_beside_the_users_own_says_nothing_of_its_port(tmp_path, tokenizer, genes):
    """Dask's HTTP server asks for port 8787 and warns where another cluster has it."""
    path = write(make_cells(genes, 20, seed=1), tmp_path / "cells.h5ad")
    with socket.socket() as taken:
        # Where another program has the port, it is taken all the same.
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        tokenize_corpus(path, tmp_path / "out", tokenizer=tokenizer, dask="local", num_proc=1)
    assert len(load_from_disk(tmp_path / "out")) == 20
