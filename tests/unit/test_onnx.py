"""ONNX graphs against torch, on cells and lengths that were not there when they were traced."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from geneformer_hf import (
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
    GeneformerTokenizer,
    add_adapter,
    embed_cells,
    export_onnx,
)
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError, MissingExtraError, OutputExistsError
from geneformer_hf.hub import onnx_export
from geneformer_hf.models.adapters import save_adapter
from tests.conftest import tiny_config
from tests.tolerances import SAME_MODEL

HEADS = {
    "first": (GeneformerForSequenceClassification, {"num_labels": 3, "pooling": "first"}),
    "mean": (GeneformerForSequenceClassification, {"num_labels": 3, "pooling": "mean"}),
    "attention": (GeneformerForSequenceClassification, {"num_labels": 3, "pooling": "attention"}),
    "numbers": (
        GeneformerForSequenceClassification,
        {"num_labels": 2, "pooling": "cls", "problem_type": "regression", "label_scale": [2.0, 3.0], "label_mean": [1.0, -1.0]},
    ),
    "tasks": (GeneformerForMultiTaskClassification, {"task_labels": {"a": ["x", "y"], "b": ["1", "2", "3"]}, "pooling": "mean"}),
    "genes": (GeneformerForTokenClassification, {"num_labels": 2}),
    "bare": (GeneformerModel, {}),
}


def run(path, **given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, {name: given[name] for name in names}), strict=True))


def test_a_masked_gene_model(model_folder, model, tokenizer, cells, tmp_path):
    done = export_onnx(model_folder, tmp_path / "onnx", int8=True)
    assert done.error < 1e-5
    assert 0 < done.int8_error < 0.1
    assert done.files == [
        "README.md",
        "config.json",
        "encoder.onnx",
        "encoder_int8.onnx",
        "gene_table.json",
        "head.onnx",
        "onnx.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("encoder.onnx", "head.onnx", "encoder_int8.onnx"):
        onnx.checker.check_model(onnx.load(tmp_path / "onnx" / name))
    found = GeneformerTokenizer.from_pretrained(tmp_path / "onnx")
    # One cell, all cells, and cells without any padding.
    for n in (1, 7, 30):
        batch = found(cells[:n], padding=True, return_tensors="np")
        hidden = run(tmp_path / "onnx" / "encoder.onnx", **batch)
        with torch.inference_mode():
            expected = model(**{k: torch.from_numpy(v) for k, v in batch.items()}, output_hidden_states=True)
        real = batch["attention_mask"].astype(bool)
        assert np.abs(hidden["last_hidden_state"] - expected.hidden_states[-1].numpy())[real].max() < SAME_MODEL
        assert np.abs(hidden["second_to_last_hidden_state"] - expected.hidden_states[-2].numpy())[real].max() < SAME_MODEL
        logits = run(tmp_path / "onnx" / "head.onnx", last_hidden_state=hidden["last_hidden_state"])["logits"]
        assert np.abs(logits - expected.logits.numpy())[real].max() < 10 * SAME_MODEL
    # What embed_cells gives, from the graph.
    assert np.abs(hidden["second_to_last_hidden_state"][:, 0] - embed_cells(model, cells, tokenizer=tokenizer, progress=False)).max() < SAME_MODEL
    with pytest.raises(OutputExistsError):
        export_onnx(model_folder, tmp_path / "onnx")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("attention", "numbers") else []) for name in HEADS])
def test_every_head(name, tokenizer, cells, tmp_path):
    cls, fields = HEADS[name]
    torch.manual_seed(6)
    # A graph of one layer is traced in half the time.
    model = cls(tiny_config(tokenizer, num_hidden_layers=1, **fields)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    batch = tokenizer(cells[:5], padding=True, return_tensors="np")
    hidden = run(tmp_path / "onnx" / "encoder.onnx", **batch)
    assert json.loads((tmp_path / "onnx" / "onnx.json").read_text())["outputs"][:2] == list(hidden)
    if name == "bare":
        assert not (tmp_path / "onnx" / "head.onnx").exists()
        return
    found = run(tmp_path / "onnx" / "head.onnx", **batch, last_hidden_state=hidden["last_hidden_state"])
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits
    assert list(found) == (["logits_a", "logits_b"] if name == "tasks" else ["logits"])
    for ours, theirs in zip(found.values(), expected if isinstance(expected, tuple) else (expected,), strict=True):
        keep = batch["attention_mask"].astype(bool) if name == "genes" else slice(None)
        assert np.abs(ours - theirs.numpy())[keep].max() < 10 * SAME_MODEL


def test_an_adapter_is_merged_on_the_way(model_folder, model, tokenizer, cells, tmp_path):
    from geneformer_hf import load_model

    adapted = add_adapter(load_model(model_folder))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_adapter(adapted, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    export_onnx(tmp_path / "adapter", tmp_path / "onnx")
    batch = tokenizer(cells[:3], padding=True, return_tensors="np")
    found = run(tmp_path / "onnx" / "encoder.onnx", **batch)["second_to_last_hidden_state"][:, 0]
    assert np.abs(found - embed_cells(tmp_path / "adapter", cells[:3].copy(), progress=False)).max() < 10 * SAME_MODEL
    assert np.abs(found - embed_cells(model, cells[:3].copy(), tokenizer=tokenizer, progress=False)).max() > 0.01


def test_a_graph_that_differs_is_not_written(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match="outputs of ONNX Runtime differ from torch's by"):
        export_onnx(model_folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_without_the_packages(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ONNX needs onnx, onnxscript, onnxruntime\. Install with `pip install 'geneformer-hf\[onnx\]'`"):
        export_onnx(model_folder, tmp_path / "onnx")


def test_by_command(model_folder, tmp_path, capsys):
    assert main(["export", str(model_folder), str(tmp_path / "onnx"), "--format", "onnx", "--int8"]) == 0
    said = capsys.readouterr().out
    assert "encoder.onnx, encoder_int8.onnx, head.onnx" in said
    assert "Largest difference from torch" in said
    assert main(["export", str(model_folder), str(tmp_path / "bert"), "--int8"]) == 1
    assert "--int8 is for --format onnx" in capsys.readouterr().err
