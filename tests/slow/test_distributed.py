"""Two real processes on a CPU, as both launchers start them; sharding on a CPU mesh; kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM
from tests.tolerances import TRAJECTORY, WEIGHTS_OF_TWO_PROCESSES
from tests.training.conftest import NO_DROPOUT, SHAPE, make_tokens

pytestmark = pytest.mark.slow
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ALONE = [sys.executable, "-m", "geneformer_hf"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "geneformer_hf"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes", "2", "-m", "geneformer_hf"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data")
    make_tokens(200).save_to_disk(folder / "tokens")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def config(data, output, **more):
    settings = {
        "output_dir": str(output), "tokenizer": str(data / "tokenizer"), "train_data": [str(data / "tokens")], "shape": "gf-6L-30M-i2048", "shape_overrides": NO_DROPOUT,
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 10, "held_out": 10, "disable_tqdm": True,
    } | more  # fmt: skip
    output.parent.mkdir(exist_ok=True)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return ["pretrain", "--config", str(path)]


def run(launcher, arguments, **environment):
    return subprocess.run([*launcher, *arguments], env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=240, check=False)


def trained(launcher, data, output, **settings):
    done = run(launcher, config(data, output, **settings), **({"ACCELERATE_USE_CPU": "1"} if launcher is ACCELERATE else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    return history(output), load_file(output / "model" / "model.safetensors"), done.stderr


def history(output):
    entries = json.loads((output / "model" / "history.json").read_text())
    return [float(entry["loss"]) for entry in entries if "loss" in entry], [float(entry["eval_loss"]) for entry in entries if "eval_loss" in entry]


@pytest.fixture(scope="module")
def alone(data):
    return trained(ALONE, data, data / "alone")


def assert_same(found, expected):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, abs=TRAJECTORY)
    for name, weight in expected[1].items():
        # The bias of keys has no influence on attention, so its gradient is nothing but rounding, which Adam makes steps of.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(found[1][name], weight, atol=WEIGHTS_OF_TWO_PROCESSES, rtol=WEIGHTS_OF_TWO_PROCESSES)


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        pytest.param(TORCHRUN, {"per_device_train_batch_size": 4}, id="torchrun"),
        pytest.param(TORCHRUN, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, id="accumulated"),
        pytest.param(TORCHRUN, {"per_device_train_batch_size": 4, "batch_layout": "padded", "group_by_length": False}, id="padded"),
        pytest.param(ACCELERATE, {"per_device_train_batch_size": 4}, id="accelerate"),
    ],
)
def test_two_processes_train_as_one_with_the_same_cells_a_step(data, alone, launcher, settings, request):
    found = trained(launcher, data, data / f"two_{request.node.callspec.id}", num_processes=2, **settings)
    assert "(2 processes, cpu)" in found[2]
    assert_same(found, alone)


def test_grouping_by_length_is_the_same_in_two_processes(data):
    grouped = {"batch_layout": "padded", "group_by_length": True}
    alone = trained(ALONE, data, data / "grouped_alone", gradient_accumulation_steps=2, per_device_train_batch_size=4, **grouped)
    assert_same(trained(TORCHRUN, data, data / "grouped_two", per_device_train_batch_size=4, **grouped), alone)


def test_batches_of_tokens_are_the_same_in_two_processes(data):
    alone = trained(ALONE, data, data / "tokens_alone", gradient_accumulation_steps=2, max_tokens_per_batch=150)
    assert_same(trained(TORCHRUN, data, data / "tokens_two", max_tokens_per_batch=150), alone)


def test_one_process_goes_on_from_a_checkpoint_of_two(data, alone):
    output = data / "handed_over"
    trained(TORCHRUN, data, output, per_device_train_batch_size=4, save_total_limit=9)
    shutil.rmtree(output / "model")
    for checkpoint in output.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-20":
            shutil.rmtree(checkpoint)
    assert {path.name for path in (output / "checkpoint-20").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    GeneformerForMaskedLM.from_pretrained(output / "checkpoint-20")
    found = trained(ALONE, data, output)
    assert "Going on from" in found[2]
    assert_same(found, alone)


def test_processes_that_are_not_those_that_were_meant(data):
    """accelerate launch --cpu starts one process, whatever number it is told."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "geneformer_hf"]
    done = run(launcher, config(data, data / "one_of_two", num_processes=2))
    assert done.returncode == 1
    assert "num_processes is 2, and 1 are running" in done.stderr
    assert not (data / "one_of_two").exists()


def test_fsdp_that_does_not_happen_is_refused(data):
    done = run(TORCHRUN, config(data, data / "unsharded", fsdp="full_shard", per_device_train_batch_size=4))
    assert done.returncode == 1
    assert "FSDP was asked for, but the model is not sharded: each of 2 processes holds all of it" in done.stderr
    assert not (data / "unsharded" / "model").exists()


def test_killed_at_any_moment_one_process_ends_with_the_same_bytes(data):
    settings = {
        "shape_overrides": SHAPE | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "num_train_epochs": 6,
        "save_steps": 3,
        "save_total_limit": 2,
    }
    trained(ALONE, data, data / "unbroken", **settings)
    arguments, output, rng = config(data, data / "broken", **settings), data / "broken", random.Random(0)
    for wanted in (1, 12, 30, 60):
        kill_after(ALONE, arguments, output, wanted, rng)
    done = run(ALONE, arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stderr
    assert (output / "model" / "model.safetensors").read_bytes() == (data / "unbroken" / "model" / "model.safetensors").read_bytes()
    assert history(output) == history(data / "unbroken")


def test_two_killed_processes_go_on_to_the_same_weights(data, alone):
    arguments, output = config(data, data / "broken_two", per_device_train_batch_size=4), data / "broken_two"
    kill_after(TORCHRUN, arguments, output, 10, random.Random(1))
    found = trained(TORCHRUN, data, output, per_device_train_batch_size=4)
    assert "Going on from" in found[2]
    assert_same(found, alone)


def kill_after(launcher, arguments, output, step, rng):
    """Kill a run with all its processes some milliseconds after a checkpoint of at least this step is there."""
    process = subprocess.Popen([*launcher, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.name.split("-")[1]) >= step for path in output.glob("checkpoint-*")):
            time.sleep(rng.random() * 0.2)
            # torchrun gives its workers sessions of their own.
            for running in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, "it was killed, and had not ended by itself"
    assert not (output / "model").exists()


SHARDED = Path(__file__).with_name("sharded_training.py")


def test_sharded_weights_train_as_whole_ones(data, tmp_path):
    """FSDP 2 on a CPU mesh: what Trainer leaves to accelerate, which falls back on CPUs, is done by hand on our model."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SHARDED), str(tmp_path)],
        env=ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, gathered = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "gathered.pt")
    assert whole["losses"] == pytest.approx(gathered["losses"], abs=TRAJECTORY)
    fresh = GeneformerForMaskedLM(GeneformerConfig(vocab_size=64, **NO_DROPOUT))
    fresh.load_state_dict(gathered["weights"])
    assert fresh.cls.predictions.decoder.weight is fresh.bert.embeddings.word_embeddings.weight
    for name, weight in whole["weights"].items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(gathered["weights"][name], weight, atol=WEIGHTS_OF_TWO_PROCESSES, rtol=WEIGHTS_OF_TWO_PROCESSES)
