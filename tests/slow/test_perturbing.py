"""A scan in two real processes, and killed at random moments: the same table, nothing twice, nothing lost."""

import random
import signal
import subprocess
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_hf import GeneformerForMaskedLM, load_cells
from tests.conftest import make_cells, tiny_config
from tests.slow.test_distributed import ALONE, ENVIRONMENT, TORCHRUN
from tests.tolerances import SAME_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, genes):
    folder = tmp_path_factory.mktemp("perturbing")
    torch.manual_seed(2)
    GeneformerForMaskedLM(tiny_config(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    load_cells(make_cells(genes, 1000), tokenizer=tokenizer).save_to_disk(folder / "cells")
    return folder


def command(folder, output):
    return [
        "perturb",
        str(folder / "cells"),
        "--model",
        str(folder / "model"),
        "--kind",
        "delete",
        "--genes",
        "all",
        "--readout",
        "gene",
        "--output",
        str(output),
    ]


@pytest.fixture(scope="module")
def whole(folder):
    done = subprocess.run([*ALONE, *command(folder, folder / "whole.parquet")], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return pq.read_table(folder / "whole.parquet")


def test_two_processes_make_the_table_of_one(folder, whole):
    done = subprocess.run([*TORCHRUN, *command(folder, folder / "two.parquet")], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = pq.read_table(folder / "two.parquet")
    assert found.drop_columns("value").equals(whole.drop_columns("value"))
    np.testing.assert_allclose(found["value"].to_numpy(), whole["value"].to_numpy(), atol=SAME_MODEL)
    assert done.stdout.count("values written to") == 1


def test_killed_at_random_moments_it_ends_with_the_same_table(folder, whole):
    rng, output, kills = random.Random(3), folder / "killed.parquet", 0
    parts = output.with_name(f".{output.name}.unfinished") / "parts"
    for _ in range(10):
        process = subprocess.Popen([*ALONE, *command(folder, output)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        n_before = len(list(parts.glob("*.parquet"))) if parts.is_dir() else 0
        # From the moment that it writes, so that each kill falls into the work.
        while process.poll() is None and (len(list(parts.glob("*.parquet"))) if parts.is_dir() else 0) <= n_before:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        if process.poll() is not None:
            break
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            # The kill came after the last step; that the output is whole is looked at below.
            break
        kills += 1
    assert kills > 1
    done = subprocess.run([*ALONE, *command(folder, output)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pq.read_table(output).equals(whole)
    assert not parts.parent.exists()
    written = output.stat().st_mtime_ns
    again = subprocess.run([*ALONE, *command(folder, output)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0
    assert "is whole already" in again.stderr
    assert output.stat().st_mtime_ns == written
