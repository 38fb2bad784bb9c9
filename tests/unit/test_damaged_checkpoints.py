"""Checkpoints that are damaged, or whose config.json holds what it may not: one clear message each, through every door."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from geneformer_hf import (
    GeneformerConfig,
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    load_model,
    predict,
)
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError, CheckpointFilesError, UnsafePickleError, WeightShapesError
from geneformer_hf.models.config_fields import FIELDS
from tests.conftest import tiny_config

DOORS = (load_model, GeneformerForMaskedLM.from_pretrained, AutoModelForMaskedLM.from_pretrained)
VALUES = (-1, 0, 10**12, 1.5, float("nan"), float("inf"), "x", [], [1], {}, {"a": 1}, None, True, [[1]])


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"model_type"}))
def test_every_field_of_a_configuration_is_read_or_refused(name, model_folder, tokenizer):
    """Whatever stands there: a configuration that passes makes a model, and what does not is named with what is legal."""
    before = json.loads((model_folder / "config.json").read_text())
    refusals = []
    for value in VALUES:
        (model_folder / "config.json").write_text(json.dumps(before | {name: value}))
        try:
            config = AutoConfig.from_pretrained(model_folder)
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            GeneformerForMaskedLM(config)
    assert len(refusals) >= 7
    assert all(f"{name} is " in words and "expected" in words for words in refusals)


WRONG = {
    "pad_beyond_the_vocabulary": ({"pad_token_id": 64}, "pad_token_id is 64; expected a token id below vocab_size, which is 64"),
    "heads_that_do_not_divide": ({"num_attention_heads": 3}, "num_attention_heads is 3; expected a divisor of hidden_size, which is 16"),
    "a_billion_layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a whole number from 1 to 1,000"),
    "not_a_number": ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan; expected a number from 0 to 1"),
    "an_unknown_activation": ({"hidden_act": "nothing"}, "hidden_act is 'nothing'; expected one of relu, gelu"),
    "scale_without_mean": ({"label_scale": [1.0]}, r"label_scale is \[1.0\]; expected as many numbers as label_mean has \(0\)"),
    "nested": ({"hidden_size": [[16]]}, r"hidden_size is \[\[16\]\]; expected a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_configuration_may_not_hold_is_refused_through_every_door(name, model_folder, tmp_path, capsys):
    fields, words = WRONG[name]
    edit(model_folder, **fields)
    for door in DOORS:
        with pytest.raises(CheckpointError, match=words):
            door(str(model_folder))
    assert main(["info", str(model_folder)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "7", '"x"', "null", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(content, model_folder):
    (model_folder / "config.json").write_text(content)
    for door in (load_model, GeneformerForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|holds a JSON|nests)"):
            door(str(model_folder))


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def as_folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def garbage(path):
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(b"garbage")


DAMAGE = {
    "cut": (cut, CheckpointError, "invalid header length|incomplete|header"),
    "empty": (lambda path: path.write_bytes(b""), CheckpointError, "header too small"),
    "noise": (lambda path: path.write_bytes(os.urandom(5000)), CheckpointError, "header"),
    "a_header_beyond_memory": (lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), CheckpointError, "header too large"),
    "a_folder": (as_folder, CheckpointFilesError, "is a folder; expected a file of weights|no file named"),
    "a_link_to_nothing": (dangling, CheckpointFilesError, "which is not there; expected a file of weights|no file named"),
    "missing": (lambda path: path.unlink(), CheckpointFilesError, "no file named"),
    "no_pickle": (garbage, UnsafePickleError, "nothing of it was executed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused_through_every_door(name, model_folder):
    damage, error, words = DAMAGE[name]
    damage(model_folder / "model.safetensors")
    for door in DOORS:
        with pytest.raises(error, match=words):
            door(str(model_folder))


def test_weights_of_another_shape_are_named_with_both_shapes(model_folder):
    edit(model_folder, vocab_size=99)
    for door in DOORS:
        with pytest.raises(WeightShapesError, match=r"2 weights have other shapes.*word_embeddings\.weight is 64 x 16 in the file and 99 x 16 by config\.json"):
            door(str(model_folder))
        # As transformers raises it.
        with pytest.raises(RuntimeError):
            door(str(model_folder))
    assert GeneformerForMaskedLM.from_pretrained(model_folder, ignore_mismatched_sizes=True).config.vocab_size == 99


@pytest.fixture
def multi_task(tokenizer, tmp_path):
    model = GeneformerForMultiTaskClassification(tiny_config(tokenizer, task_labels={"a": ["x", "y"], "b": ["u", "v", "w"]}))
    model.save_pretrained(tmp_path / "multi")
    tokenizer.save_pretrained(tmp_path / "multi")
    return tmp_path / "multi"


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_plain_adapter_of_a_multi_task_model_opens_on_it(task_type, multi_task, tokenizer, cells, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    plain = peft.get_peft_model(GeneformerForMultiTaskClassification.from_pretrained(multi_task), peft.LoraConfig(task_type=task_type))
    plain.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    opened = load_model(tmp_path / "adapter", base=multi_task)
    assert isinstance(opened, GeneformerForMultiTaskClassification)
    theirs, ours = (predict(one, cells, progress=False).to_frame() for one in (multi_task, opened))
    # A new adapter changes nothing.
    numbers = theirs.select_dtypes("number").columns
    assert np.allclose(theirs[numbers], ours[numbers])


def test_peft_knows_which_layers_a_lora_is_for(tokenizer):
    """In a process that has loaded no adapter of ours before."""
    import subprocess
    import sys

    shape = "vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64"
    code = f"import peft; from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM; m = peft.get_peft_model(GeneformerForMaskedLM(GeneformerConfig({shape})), peft.LoraConfig()); print(sorted(m.peft_config['default'].target_modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "['query', 'value']"


def test_the_defaults_of_a_configuration_are_legal():
    from geneformer_hf.models.config_fields import check_fields

    for config in (GeneformerConfig(), GeneformerConfig.from_preset("gf-6L-30M-i2048"), GeneformerConfig.from_preset("Geneformer-V2-316M")):
        check_fields(config.to_dict(), "the defaults")


def test_threads_may_open_models_at_once(model_folder, multi_task):
    """transformers switches the initialisation of weights off while it opens a model; two at once used to leave it off."""
    from concurrent.futures import ThreadPoolExecutor

    expected = load_model(model_folder).state_dict()
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(load_model, [model_folder, multi_task] * 12))
    assert all(torch.equal(tensor, expected[name]) for one in opened[::2] for name, tensor in one.state_dict().items())
    fresh = torch.nn.Linear(64, 64)
    assert 0 < fresh.weight.abs().max() <= 1 / 8
    assert torch.nn.init.normal_(torch.empty(1000)).std() == pytest.approx(1, abs=0.2)
    assert torch.get_default_dtype() == torch.float32
