"""Checkpoints that lack weights are refused by name; prefixes of wrapped models are taken off and reported."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM

from geneformer_hf import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
    add_adapter,
    embed_cells,
    load_model,
    predict,
)
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError
from geneformer_hf.models.adapters import save_adapter
from geneformer_hf.models.weight_checks import without_wrappers
from tests.conftest import tiny_config
from tests.tolerances import SAME_MODEL

WEIGHTS = "model.safetensors"


def rewrite(folder, change, metadata=None):
    state = load_file(folder / WEIGHTS)
    save_file({name: tensor for old, tensor in state.items() if (name := change(old)) is not None}, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def classifier_folder(tmp_path, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "classifier"
    GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=3, pooling="mean")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PREFIXES = ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrapped_models_are_taken_off(prefix, model_folder, cells, caplog):
    expected = embed_cells(model_folder, cells)
    rewrite(model_folder, lambda name: prefix + name)
    assert np.abs(embed_cells(model_folder, cells) - expected).max() < SAME_MODEL
    assert re.search(rf"the names of its weights carry '{re.escape(prefix)}', of a wrapped or compiled model, which was taken off", caplog.text)
    for door in (GeneformerForMaskedLM, AutoModelForMaskedLM, GeneformerModel, AutoModel):
        assert torch.equal(
            door.from_pretrained(model_folder).base_model.embeddings.word_embeddings.weight,
            load_file(model_folder / WEIGHTS)[f"{prefix}bert.embeddings.word_embeddings.weight"],
        )


def test_layers_that_were_compiled_each(model_folder, cells):
    expected = embed_cells(model_folder, cells)
    rewrite(model_folder, lambda name: re.sub(r"(encoder\.layer\.\d+\.)", r"\1_orig_mod.", name))
    assert np.abs(embed_cells(model_folder, cells) - expected).max() < SAME_MODEL


def test_a_model_without_prefixes_saves_without_them(model_folder, tmp_path):
    rewrite(model_folder, lambda name: f"module.{name}")
    load_model(model_folder).save_pretrained(tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again" / WEIGHTS) if without_wrappers(name) != name]


def test_weights_of_a_bin_file_with_prefixes(model_folder, cells):
    expected = embed_cells(model_folder, cells)
    torch.save({f"module.{name}": tensor for name, tensor in load_file(model_folder / WEIGHTS).items()}, model_folder / "pytorch_model.bin")
    (model_folder / WEIGHTS).unlink()
    assert np.abs(embed_cells(model_folder, cells) - expected).max() < SAME_MODEL


LOST = {
    "the_encoder": lambda name: None if "encoder" in name or "embeddings" in name else name,
    "one_layer": lambda name: None if "encoder.layer.2." in name else name,
    "one_weight": lambda name: None if name.endswith("layer.1.attention.self.key.weight") else name,
    "another_prefix": lambda name: f"student.{name}",
    "renamed": lambda name: name.replace("attention.self", "self_attn"),
}


@pytest.mark.parametrize("lost", list(LOST))
def test_a_checkpoint_without_weights_of_its_encoder_is_refused_through_every_door(lost, model_folder, h5ad, tmp_path, capsys):
    rewrite(model_folder, LOST[lost])
    doors = [load_model, GeneformerForMaskedLM.from_pretrained, GeneformerModel.from_pretrained, AutoModelForMaskedLM.from_pretrained, AutoModel.from_pretrained,
             GeneformerForSequenceClassification.from_pretrained, lambda p: embed_cells(p, h5ad)]  # fmt: skip
    for door in doors:
        with pytest.raises(CheckpointError, match=r"model lacks \d+ weights of its encoder: (bert\.)?e\w+\."):
            door(model_folder)
    for command in (["embed"], ["perturb", "--kind", "delete", "--genes", "all"], ["evaluate", "--labels", "cell_type", "--no-baselines"]):
        output = tmp_path / {"embed": "o.h5ad", "perturb": "o.parquet", "evaluate": "o"}[command[0]]
        assert main([command[0], str(h5ad), *command[1:], "--model", str(model_folder), "--output", str(output)]) == 1
        error = capsys.readouterr().err
        assert "weights of its encoder" in error
        assert "--allow-missing-weights" in error
        assert not output.exists()
    assert isinstance(load_model(model_folder, allow_missing_weights=True), GeneformerForMaskedLM)


def test_the_command_draws_missing_weights_if_told_to(model_folder, h5ad, tmp_path):
    rewrite(model_folder, LOST["one_layer"])
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "o.parquet"), "--allow-missing-weights"]) == 0


@pytest.mark.parametrize("n", [2, 5])
def test_layers_that_do_not_fit_the_configuration_are_refused(n, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n}))
    words = (
        r"holds weights of 3 layers, and its config\.json says num_hidden_layers is 2"
        if n == 2
        else r"lacks 32 weights of its encoder: (bert\.)?encoder\.layer\.3"
    )
    for door in (load_model, GeneformerForMaskedLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            door(model_folder)
    if n == 2:
        assert GeneformerForMaskedLM.from_pretrained(model_folder, num_hidden_layers=2).config.num_hidden_layers == 2


@pytest.mark.parametrize("lost", ["classifier", "pooler"])
def test_a_classifier_without_what_it_reads_is_refused(lost, classifier_folder, h5ad, tmp_path, capsys):
    rewrite(classifier_folder, lambda name: None if lost in name else name)
    for door in (load_model, lambda p: predict(p, h5ad), lambda p: embed_cells(p, h5ad)):
        with pytest.raises(CheckpointError, match=rf"classifier lacks 2 weights: (bert\.)?{lost}"):
            door(classifier_folder)
    assert main(["predict", str(h5ad), "--model", str(classifier_folder), "--output", str(tmp_path / "o.h5ad")]) == 1
    assert "lacks 2 weights" in capsys.readouterr().err


def test_heads_are_drawn_for_fine_tuning_as_transformers_does(model_folder):
    for cls, fields in (
        (GeneformerForSequenceClassification, {"num_labels": 3}),
        (GeneformerForTokenClassification, {"num_labels": 2}),
        (GeneformerForMultiTaskClassification, {"task_labels": {"a": ["x", "y"]}}),
    ):
        assert isinstance(cls.from_pretrained(model_folder, **fields), cls)


def test_a_pooler_that_nothing_reads_is_no_reason_to_refuse(model_folder, tokenizer, tmp_path, cells):
    encoder = GeneformerModel.from_pretrained(model_folder)
    assert encoder.pooler is not None
    assert embed_cells(encoder, cells, tokenizer=tokenizer).shape == (30, 16)
    encoder.save_pretrained(tmp_path / "encoder")
    rewrite(tmp_path / "encoder", lambda name: None if name.startswith("pooler") else name)
    assert isinstance(load_model(tmp_path / "encoder"), GeneformerModel)


def test_a_decoder_that_is_tied_may_be_absent(model_folder, model):
    rewrite(model_folder, lambda name: None if "decoder" in name else name)
    opened = load_model(model_folder)
    assert torch.equal(opened.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight)


def test_a_published_folder_without_tokenizer_files(tmp_path, model):
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("cls_token_id", "eos_token_id", "pooling", "vocabulary_fingerprint")}
    BertForMaskedLM(BertForMaskedLM.config_class(**{k: v for k, v in config.items() if k != "model_type"})).save_pretrained(tmp_path / "bert")
    assert isinstance(GeneformerForMaskedLM.from_pretrained(tmp_path / "bert"), GeneformerForMaskedLM)


@pytest.fixture
def adapter(classifier_folder, tmp_path):
    model = add_adapter(load_model(classifier_folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda name: None if "lora_B" in name else name, r"the adapter in .* lacks \d+ weights: base_model\.", id="half_of_its_tensors"),
        pytest.param(lambda name: name.replace("lora_A", "lora_X"), r"the adapter in .* lacks \d+ weights", id="renamed"),
        pytest.param(lambda name: name.replace("base_model.model.", "model."), r"the adapter in .* lacks \d+ weights", id="another_prefix"),
        pytest.param(lambda name: None if "classifier" in name else name, r"the adapter in .* lacks \d weights: base_model\.model\.classifier", id="no_head"),
        pytest.param(lambda name: name.replace("layer.2", "layer.7"), r"the adapter in .* lacks \d+ weights", id="other_layers"),
    ],
)
def test_an_adapter_without_all_of_its_weights_is_refused(change, words, adapter, h5ad):
    state = load_file(adapter / ADAPTER)
    save_file({new: tensor for old, tensor in state.items() if (new := change(old)) is not None}, adapter / ADAPTER, metadata={"format": "pt"})
    for door in (load_model, lambda p: predict(p, h5ad)):
        with pytest.raises(CheckpointError, match=words):
            door(adapter)


def test_an_adapter_with_weights_that_have_no_place_is_refused(adapter):
    state = load_file(adapter / ADAPTER)
    save_file(state | {"base_model.model.bert.odd.lora_A.weight": torch.zeros(2, 2)}, adapter / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds 1 weights that have no place in .*odd\.lora_A"):
        load_model(adapter)


def test_a_plain_adapter_whose_base_has_no_pooler_is_refused(model_folder, tmp_path, h5ad):
    """Saved by peft alone: its base is a masked-gene model, and the head reads a pooler that nobody trained."""
    from peft import LoraConfig, get_peft_model

    base = GeneformerForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "plain")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"lacks 2 weights, which neither the base nor the adapter holds: bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight"
        ):
            load_model(tmp_path / "plain", base=model_folder)
    assert load_model(tmp_path / "plain", base=model_folder, allow_missing_weights=True).config.num_labels == 2
