"""Fine-tuning in two real processes, killed and gone on with; a search shared by processes; an adapter opened by a process that knows only its folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from geneformer_hf import GeneformerForMaskedLM
from tests.conftest import tiny_config
from tests.slow.test_distributed import ALONE, ENVIRONMENT, TORCHRUN
from tests.tolerances import TRAJECTORY, WEIGHTS_OF_TWO_PROCESSES
from tests.training.conftest import make_labelled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer, genes):
    folder = tmp_path_factory.mktemp("data")
    make_labelled(genes, 200).write_h5ad(folder / "cells.h5ad")
    torch.manual_seed(3)
    GeneformerForMaskedLM(tiny_config(tokenizer, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    half = len(genes) // 2
    (folder / "genes.json").write_text(json.dumps({"a": genes[:half], "b": genes[half:]}))
    return folder


def command(data, output, name="finetune", **more):
    settings = {
        "output_dir": str(output), "from_checkpoint": str(data / "base"), "train_data": [str(data / "cells.h5ad")], "label": ["cell_type"], "num_train_epochs": 2, "learning_rate": 3e-3,
        "per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True, "baselines": False,
    } | more  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return [name, "--config", str(path)]


def run(launcher, arguments):
    done = subprocess.run([*launcher, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


KINDS = {
    "classes": {},
    "heads_by_attention": {"label": ["cell_type", "sex"], "pooling": "attention", "class_weights": "balanced"},
    "integrated": {"integrate": "sex", "pooling": "mean"},
    "lora": {"adapter": "lora", "lora_dropout": 0.0},
    "genes": {"label": None, "gene_classes": "genes.json", "n_folds": 2, "num_train_epochs": 1},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_tune_as_one(data, kind):
    settings = KINDS[kind] | ({"gene_classes": str(data / "genes.json")} if "gene_classes" in KINDS[kind] else {})
    run(ALONE, command(data, data / f"{kind}1", **settings))
    run(TORCHRUN, command(data, data / f"{kind}2", **settings, per_device_train_batch_size=4, num_processes=2, use_cpu=True))
    one, two = data / f"{kind}1" / "model", data / f"{kind}2" / "model"
    losses = [[e["loss"] for entries in json.loads((folder / "history.json").read_text()).values() for e in entries if "loss" in e] for folder in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], atol=TRAJECTORY, rtol=TRAJECTORY)
    name = "adapter_model.safetensors" if "adapter" in settings else "model.safetensors"
    ours, theirs = load_file(two / name), load_file(one / name)
    for key, weight in theirs.items():
        if not key.endswith("key.bias"):
            torch.testing.assert_close(ours[key], weight, atol=WEIGHTS_OF_TWO_PROCESSES, rtol=WEIGHTS_OF_TWO_PROCESSES, msg=key)
    found, expected = (pd.read_csv(folder / "predictions.csv") for folder in (two, one))
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers], expected[numbers], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("folds", [None, 3], ids=["split", "folds"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(data, folds):
    settings = {"dropout": 0.1, "num_train_epochs": 6, "n_folds": folds}
    name = "folds" if folds else "split"
    run(ALONE, command(data, data / f"whole-{name}", **settings))
    arguments = command(data, data / f"killed-{name}", **settings)
    rng, kills = random.Random(5), 0
    while not (data / f"killed-{name}" / "model").exists():
        process = subprocess.Popen([*ALONE, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < 3:
            deadline = time.monotonic() + 60
            while not list((data / f"killed-{name}").glob("**/checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(rng.random() * 1.5)
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, error = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), error[-2000:]
    assert kills
    for file in ("model.safetensors", "predictions.csv", "splits.csv"):
        assert (data / f"killed-{name}" / "model" / file).read_bytes() == (data / f"whole-{name}" / "model" / file).read_bytes(), file


def test_trials_in_two_processes_share_one_study(data):
    more = {"search": {"n_trials": 6, "n_jobs": 2, "space": {"learning_rate": {"low": 1.0e-3, "high": 1.0e-2, "log": True}}}, "num_train_epochs": 1}
    run(ALONE, command(data, data / "searched", "search", **more))
    trials = pd.read_csv(data / "searched" / "search" / "trials.csv")
    assert len(trials) == 6
    assert trials["learning_rate"].nunique() == 6
    assert (data / "searched" / "model" / "report.html").is_file()


def test_plain_auto_classes_in_a_process_that_imports_the_plugin(data):
    run(ALONE, command(data, data / "auto", label=["cell_type", "sex"], num_train_epochs=1))
    code = (
        "import geneformer_hf; from transformers import AutoModelForSequenceClassification as A, AutoTokenizer as T;"
        f"m = A.from_pretrained({str(data / 'auto' / 'model')!r}); T.from_pretrained({str(data / 'auto' / 'model')!r}); print(type(m).__name__, m.config.task_labels)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "GeneformerForMultiTaskClassification {'cell_type': ['B', 'NK', 'T'], 'sex': ['f', 'm']}"
