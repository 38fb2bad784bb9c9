"""LoRA, 8-bit and 4-bit: what is trained, what stands still, what comes back from a folder; the traps of peft and bitsandbytes."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file

from geneformer_hf import (
    GeneformerConfig,
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    add_adapter,
    embed_cells,
    load_cells,
    load_model,
    load_peft_model,
    merge_adapter,
    predict,
)
from geneformer_hf.cli.main import main
from geneformer_hf.data.collators import DataCollatorForCells
from geneformer_hf.errors import CheckpointError, SettingError
from geneformer_hf.models.adapters import HEADS, LoraSettings, describe_adapter, open_weights, quantization_config, save_adapter
from tests.tolerances import LOSS, QUANTISED_PROBABILITY, SAME_MODEL

KINDS = [None, "int8", "nf4"]


@pytest.fixture(scope="module")
def batch(labelled, tokenizer):
    cells = load_cells(labelled[:6], tokenizer=tokenizer, obs="none")
    return DataCollatorForCells(tokenizer)([cells[i] for i in range(6)])


@pytest.fixture(scope="module")
def large_base(tmp_path_factory, tokenizer):
    """Wide enough that 4-bit blocks are blocks."""
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(5)
    config = GeneformerConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=64, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cls_token_id=2, eos_token_id=3, vocabulary_fingerprint=tokenizer.gene_table.fingerprint,
    )  # fmt: skip
    GeneformerForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


HEADED = {
    "cells": (GeneformerForSequenceClassification, {"num_labels": 3, "problem_type": "single_label_classification", "pooling": "attention"}),
    "heads": (GeneformerForMultiTaskClassification, {"task_labels": {"a": ["x", "y"], "b": ["1", "2", "3"]}, "pooling": "mean"}),
    "genes": (GeneformerForTokenClassification, {"num_labels": 2}),
    "masked": (GeneformerForMaskedLM, {}),
}


def labels_for(name, batch):
    n, length = batch["input_ids"].shape
    return {
        "cells": torch.arange(n) % 3,
        "heads": torch.stack([torch.arange(n) % 2, torch.arange(n) % 3], dim=1),
        "genes": torch.arange(n * length).view(n, length) % 2,
        "masked": batch["input_ids"],
    }[name]


def at(model, **batch):
    """Quantised weights stay on the device they were packed for."""
    return {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def logits_of(model, batch):
    with torch.no_grad():
        logits = model(**at(model, **batch)).logits
    return (torch.cat(logits, dim=1) if isinstance(logits, tuple) else logits).cpu()


def adapted_model(name, base, quantization):
    cls, fields = HEADED[name]
    config = GeneformerConfig.from_pretrained(base, **fields)
    torch.manual_seed(0)
    model = open_weights(cls, base, config, quantization=quantization_config(quantization) if quantization else None, quiet=True)
    return add_adapter(model, LoraSettings(rank=4, dropout=0.0))


def train(model, name, batch, steps=16):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(**at(model, **batch, labels=labels_for(name, batch))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        # An evaluation in between must not change what follows.
        model.eval()
        logits_of(model, batch)
    return losses


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("name", list(HEADED))
def test_an_adapter_of_every_head_learns_and_comes_back_from_its_folder(name, quantization, large_base, batch, tmp_path):
    model = adapted_model(name, large_base, quantization)
    still = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, name, batch)
    assert losses[-1] < 0.98 * losses[0]
    assert all(torch.equal(p, still[key]) for key, p in model.named_parameters() if key in still)
    moved = [key for key, p in model.named_parameters() if p.requires_grad]
    assert moved
    assert all("lora_" in key or "modules_to_save" in key for key in moved)
    expected = logits_of(model, batch)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "config.json"}
    assert torch.equal(logits_of(load_model(tmp_path / "adapter"), batch), expected)
    assert torch.equal(logits_of(load_peft_model(tmp_path / "adapter"), batch), expected)
    about = describe_adapter(tmp_path / "adapter")
    assert (about.base, about.rank, about.quantization) == (str(large_base), 4, quantization)
    assert (
        set(about.heads)
        == {
            "cells": {"attention_pool", "classifier", "pooler"},
            "heads": {"classifiers.0", "classifiers.1", "pooler"},
            "genes": {"classifier"},
            "masked": set(),
        }[name]
    )


@pytest.mark.parametrize("name", list(HEADED))
def test_merged_is_unmerged(name, large_base, batch, tmp_path, tokenizer):
    model = adapted_model(name, large_base, None)
    train(model, name, batch, steps=3)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert not any("lora" in key for key in merged.state_dict())
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch), atol=SAME_MODEL, rtol=1e-5)


def test_gradients_reach_the_first_layer_after_an_evaluation_of_4_bit_weights(large_base, batch):
    """On some CPUs bitsandbytes repacks weights at their first use in evaluation, and packed weights have no gradient."""
    model = adapted_model("cells", large_base, "nf4")

    def gradient():
        model.train()
        model.zero_grad()
        model(**at(model, **batch, labels=labels_for("cells", batch))).loss.backward()
        return next(p.grad.clone() for key, p in model.named_parameters() if "layer.0.attention.self.query.lora_B" in key)

    before = gradient()
    model.eval()
    logits_of(model, batch)
    assert before.abs().max() > 0
    torch.testing.assert_close(gradient(), before)


def test_4_bit_weights_that_were_repacked_are_not_saved(large_base, tmp_path):
    model = load_model(large_base, quantization="nf4")
    model.save_pretrained(tmp_path / "whole")
    next(p for p in model.parameters() if hasattr(p, "quant_state")).quant_state.packing_format_for_cpu = True
    with pytest.raises(CheckpointError, match=r"1 layers of this 4-bit model have been repacked for this CPU .* Save its adapter"):
        model.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_checkpoints_come_back_as_they_were_saved(quantization, large_base, batch, tmp_path):
    model = load_model(large_base, quantization=quantization)
    before = logits_of(model, batch)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(logits_of(again, batch), before)
    plain = logits_of(load_model(large_base), batch)
    error = (before - plain).norm() / plain.norm()
    assert 0 < error < (0.1 if quantization == "int8" else 0.4)
    with pytest.raises(SettingError, match="was saved quantised"):
        load_model(tmp_path / "saved", quantization="int8")


def test_embeddings_poolers_and_heads_are_never_quantised(large_base):
    config = GeneformerConfig.from_pretrained(large_base, num_labels=3, pooling="attention")
    model = open_weights(GeneformerForSequenceClassification, large_base, config, quantization=quantization_config("nf4"), quiet=True)
    quantised = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(quantised) == 12
    assert all(".encoder.layer." in name for name in quantised)
    assert not any(name.startswith(HEADS) for name in quantised)


@pytest.mark.parametrize("settings", [{"adapter": "lora"}, {"adapter": "lora", "quantization": "nf4"}, {"adapter": "lora", "quantization": "int8", "label": ["cell_type", "sex"]}],
                         ids=["lora", "qlora", "8_bit_heads"])  # fmt: skip
def test_every_analysis_opens_an_adapter_folder(tune, large_base, labelled, settings):
    found = tune(from_checkpoint=str(large_base), num_train_epochs=2, lora_rank=4, **settings)
    # Trained on after evaluations: see the test of gradients above.
    assert not any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in found.model.parameters())
    assert describe_adapter(found.folder).n_bytes < (large_base / "model.safetensors").stat().st_size
    predicted = predict(found.folder, labelled, progress=False)
    probability = predicted["cell_type"].probabilities
    expected = found.predictions.set_index("cell_id")[[f"cell_type_probability_{n}" for n in ("B", "NK", "T")]].to_numpy()
    rows = [labelled.obs_names.get_loc(name) for name in found.predictions["cell_id"]]
    np.testing.assert_allclose(probability[rows], expected, atol=QUANTISED_PROBABILITY if "quantization" in settings else 1e-4)
    vectors = embed_cells(found.folder, labelled, progress=False)
    assert vectors.shape == (120, 64)
    assert np.isfinite(vectors).all()
    in_python = load_peft_model(found.folder)
    assert isinstance(in_python, PeftModel)
    np.testing.assert_allclose(embed_cells(in_python, labelled, tokenizer=None, progress=False), vectors, atol=SAME_MODEL)


def test_peft_alone_opens_it_too(tune, large_base, batch):
    found = tune(from_checkpoint=str(large_base), adapter="lora", num_train_epochs=1)
    again = AutoPeftModelForSequenceClassification.from_pretrained(found.folder, num_labels=3, pooling="cls").eval()
    assert torch.equal(logits_of(again, batch), logits_of(load_model(found.folder), batch))


def test_a_process_that_only_imports_the_plugin_opens_it(tune, large_base, labelled, tmp_path):
    found = tune(from_checkpoint=str(large_base), adapter="lora", quantization="nf4", num_train_epochs=1)
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    code = f"import geneformer_hf as g; g.predict({str(found.folder)!r}, {str(tmp_path / 'cells.h5ad')!r}, progress=False).to_frame().to_csv({str(tmp_path / 'p.csv')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    here = predict(found.folder, labelled, progress=False).to_frame()
    there = pd.read_csv(tmp_path / "p.csv", index_col=0)
    assert there["cell_type_predicted"].tolist() == here["cell_type_predicted"].tolist()
    np.testing.assert_allclose(there["cell_type_probability"], here["cell_type_probability"], atol=SAME_MODEL)


def test_the_adapter_of_another_base_is_refused(tune, large_base, base, tmp_path):
    found = tune(from_checkpoint=str(large_base), adapter="lora", num_train_epochs=1)
    other = tmp_path / "other"
    weights = load_file(large_base / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"] += 0.01
    other.mkdir()
    (other / "config.json").write_text((large_base / "config.json").read_text())
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"was trained on another base: its embeddings have the fingerprint \w+, and those of .*other \w+"):
        load_model(found.folder, base=other)
    with pytest.raises(CheckpointError, match="cannot be the base of"):
        load_model(found.folder, base=base)
    moved = tmp_path / "moved"
    large_base_copy = {path.name: path.read_bytes() for path in large_base.iterdir()}
    moved.mkdir()
    for name, content in large_base_copy.items():
        (moved / name).write_bytes(content)
    assert load_model(found.folder, base=moved) is not None


def test_a_base_that_is_gone(tune, large_base, labelled, tmp_path, capsys):
    found = tune(from_checkpoint=str(large_base), adapter="lora", num_train_epochs=1)
    path = found.folder / "adapter_config.json"
    path.write_text(path.read_text().replace(str(large_base), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match=r"is an adapter of the model .*gone, which is not there\. Say which model it belongs to with `load_model"):
        load_model(found.folder)
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    command = ["predict", str(tmp_path / "cells.h5ad"), "--model", str(found.folder), "--output", str(tmp_path / "out.h5ad")]
    assert main(command) == 1
    assert main([*command, "--base", str(large_base)]) == 0
    assert main(["predict", str(tmp_path / "out.h5ad"), *command[2:-1], str(tmp_path / "again.h5ad"), "--base", str(large_base)]) == 0
    assert (
        "Replaced in the copy: obs['cell_type_predicted'], obs['cell_type_probability'], obs['cell_type_entropy'], obsm['cell_type_probabilities']"
        in capsys.readouterr().out
    )


def test_an_adapter_is_no_start(tune, large_base):
    found = tune(from_checkpoint=str(large_base), adapter="lora", num_train_epochs=1)
    with pytest.raises(CheckpointError, match=r"is an adapter\. Merge it with its base first \(`geneformer-hf export .* --format merged`\)"):
        tune("second", from_checkpoint=str(found.folder))


@pytest.mark.parametrize("more", [{}, {"quantization": "nf4"}], ids=["lora", "qlora"])
def test_pretraining_goes_on_with_an_adapter(run, large_base, tokens, more):
    found = run(from_checkpoint=str(large_base), adapter="lora", lora_rank=4, held_out=0.1, learning_rate=1e-2, eval_strategy="epoch", **more)
    held_out = found.figures["held_out"]["cells"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    again = load_model(found.folder)
    assert isinstance(again, GeneformerForMaskedLM)
    assert describe_adapter(found.folder).quantization == more.get("quantization")
    ids = torch.tensor(tokens[0]["input_ids"])[None]
    torch.testing.assert_close(logits_of(again, {"input_ids": ids}), logits_of(found.model.eval(), {"input_ids": ids}), atol=LOSS, rtol=LOSS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": "nf4"}, "quantization 'nf4' is for weights that stand still: pass adapter lora as well"),
        ({"adapter": "loar"}, r"adapter 'loar' is not one of none, lora \(did you mean 'lora'\?\)"),
        ({"adapter": "lora", "lora_rank": 0}, "lora_rank is 0; expected a whole number above 0"),
        ({"adapter": "lora", "lora_dropout": 1.0}, "lora_dropout is 1.0; expected a share of at least 0 and below 1"),
        ({"adapter": "lora", "freeze_embeddings": True}, "with an adapter all embeddings stand still"),
        ({"adapter": "lora", "freeze_layers": 2}, "freeze_layers is 2, all layers of the model, so the adapter would have none"),
        ({"freeze_layers": 3}, "freeze_layers is 3, and the model has 2 layers"),
    ],
)
def test_settings_that_cannot_be_used(tune, change, message):
    with pytest.raises(SettingError, match=message):
        tune(**change)


def test_layers_that_are_frozen_get_no_update(tune, large_base):
    for targets in ("attention", "all-linear"):
        found = tune(targets, from_checkpoint=str(large_base), adapter="lora", freeze_layers=1, lora_targets=targets, num_train_epochs=1)
        updated = {key for key in load_file(found.folder / "adapter_model.safetensors") if "lora_" in key}
        assert updated
        assert not any(".layer.0." in key for key in updated)
