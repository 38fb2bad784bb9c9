"""What people have on disk from upstream Geneformer: datasets, classes of fine-tuned folders, multi-task folders."""

import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from geneformer_hf import convert_checkpoint, convert_multi_task, embed_cells, load_cells, load_model, predict
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError, SettingError, UnsafePickleError
from tests.conftest import ensembl, make_cells
from tests.tolerances import SAME_MODEL
from tests.unit.test_checkpoints import SHAPE, Hostile, write_dictionaries


@pytest.fixture
def place(tmp_path):
    """Dictionaries of 20 genes, and a fine-tuned folder as the published classifier saves it: no names of classes in it."""
    size = write_dictionaries(tmp_path / "dictionaries", "_gc104M")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=3, **SHAPE)).save_pretrained(tmp_path / "tuned")
    (tmp_path / "types_id_class_dict.pkl").write_bytes(pickle.dumps({0: "B", 1: "NK", 2: "T"}))
    return tmp_path


def convert(place, **options):
    return convert_checkpoint(place / "tuned", place / "out", dictionaries=place / "dictionaries", allow_unknown_dictionaries=True, **options)


def test_a_fine_tuned_folder_gets_the_names_of_its_classes(place):
    convert(place, id_classes=place / "types_id_class_dict.pkl", label_column="cell_type")
    cells = make_cells([ensembl(i) for i in range(1, 21)], 6)
    found = predict(place / "out", cells, progress=False)
    plain = BertForSequenceClassification.from_pretrained(place / "tuned").eval()
    tokens = load_cells(cells, tokenizer=load_tokenizer(place), obs="none")
    with torch.no_grad():
        logits = [plain(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in tokens["input_ids"][:]]
    np.testing.assert_allclose(found.heads[0].logits, logits, atol=SAME_MODEL)
    assert found.labels.tolist() == [["B", "NK", "T"][int(np.argmax(row))] for row in logits]
    assert "cell_type_predicted" in found.to_frame()


def load_tokenizer(place):
    from geneformer_hf import GeneformerTokenizer

    return GeneformerTokenizer.from_pretrained(place / "out")


def test_the_command_takes_the_classes(place, capsys):
    arguments = ["convert", str(place / "tuned"), str(place / "out"), "--dictionaries", str(place / "dictionaries"), "--allow-unknown-dictionaries"]
    assert main([*arguments, "--id-classes", str(place / "types_id_class_dict.pkl"), "--label-column", "cell_type"]) == 0
    assert json.loads((place / "out" / "config.json").read_text())["id2label"] == {"0": "B", "1": "NK", "2": "T"}


@pytest.mark.parametrize(
    "stored", [{"B": 0, "NK": 1, "T": 2}, {np.int64(0): "B", np.int64(1): "NK", np.int64(2): "T"}], ids=["the_other_way_round", "numbers_of_numpy"]
)
def test_class_dictionaries_of_either_kind_are_read(place, stored):
    (place / "types_id_class_dict.pkl").write_bytes(pickle.dumps(stored))
    convert(place, id_classes=place / "types_id_class_dict.pkl")
    assert load_model(place / "out").config.id2label == {0: "B", 1: "NK", 2: "T"}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        pytest.param({0: "B", 1: "T"}, "names the classes 0, 1, and the model has 3", id="of_another_model"),
        pytest.param(["B", "T"], "does not hold class ids and names", id="a_list"),
        pytest.param({}, "does not hold class ids and names", id="nothing"),
    ],
)
def test_other_class_dictionaries_are_refused(place, stored, message):
    (place / "types_id_class_dict.pkl").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match=message):
        convert(place, id_classes=place / "types_id_class_dict.pkl")
    assert not (place / "out").exists()


def test_a_class_dictionary_that_would_run_something_is_refused(place):
    (place / "types_id_class_dict.pkl").write_bytes(pickle.dumps({0: Hostile(place / "ran")}))
    with pytest.raises(UnsafePickleError):
        convert(place, id_classes=place / "types_id_class_dict.pkl")


class Published(nn.Module):
    """A multi-task model whose state dict has the names and shapes of upstream's, written from its description."""

    def __init__(self, config, sizes, attention):
        super().__init__()
        self.bert = BertModel(config)
        self.attention_pool = nn.Module() if attention else None
        if attention:
            self.attention_pool.attention_weights = nn.Parameter(torch.randn(config.hidden_size, 1))
        self.classification_heads = nn.ModuleList(nn.Linear(config.hidden_size, n) for n in sizes)

    def forward(self, ids):
        hidden = self.bert(input_ids=ids).last_hidden_state
        if self.attention_pool is None:
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * torch.softmax(hidden @ self.attention_pool.attention_weights, dim=1)).sum(1)
        return [head(pooled) for head in self.classification_heads]


@pytest.fixture(params=[True, False], ids=["attention", "first_position"])
def multi_task(request, tokenizer, tmp_path):
    """Tasks in an order that is not the sorted one."""
    torch.manual_seed(4)
    config = BertConfig(vocab_size=len(tokenizer), **SHAPE)
    model = Published(config, (2, 3), request.param).eval()
    folder = tmp_path / "run" / "GeneformerMultiTask"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    (folder / "hyperparameters.json").write_text(json.dumps({"dropout_rate": 0.2}))
    mappings = {"sex": {"female": 0, "male": 1}, "cell_type": {"T": 1, "B": 0, "NK": 2}}
    (tmp_path / "run" / "task_label_mappings.pkl").write_bytes(pickle.dumps(mappings))
    return folder, model


def test_a_multi_task_folder_gives_the_same_numbers(multi_task, tokenizer, cells, tmp_path):
    folder, plain = multi_task
    done = convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    assert done.task_labels == {"cell_type": ["B", "T", "NK"], "sex": ["female", "male"]}
    found = predict(tmp_path / "out", cells, progress=False)
    for number, ids in enumerate(load_cells(cells, tokenizer=tokenizer, obs="none")["input_ids"][:]):
        with torch.no_grad():
            sex, kind = plain(torch.tensor([ids]))
        np.testing.assert_allclose(found["sex"].logits[number], sex[0].numpy(), atol=SAME_MODEL)
        np.testing.assert_allclose(found["cell_type"].logits[number], kind[0].numpy(), atol=SAME_MODEL)
    assert embed_cells(tmp_path / "out", cells, progress=False).shape == (30, 16)


def test_multi_task_folders_that_do_not_fit_are_refused(multi_task, tokenizer, v1_tokenizer, tmp_path):
    folder, _ = multi_task
    mappings = tmp_path / "run" / "task_label_mappings.pkl"
    with pytest.raises(SettingError, match="a vocabulary of 64 and the tokenizer one of 62"):
        convert_multi_task(folder, tmp_path / "out", tokenizer=v1_tokenizer)
    mappings.write_bytes(pickle.dumps({"sex": {"female": 0, "male": 1}}))
    with pytest.raises(CheckpointError, match=r"heads of \[2, 3\] classes, and the labels are sex \(2\)"):
        convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    mappings.write_bytes(pickle.dumps({"sex": ["female", "male"]}))
    with pytest.raises(CheckpointError, match="does not hold classes of tasks"):
        convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    mappings.unlink()
    with pytest.raises(CheckpointError, match=r"no task_label_mappings.pkl beside or above"):
        convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    (folder / "hyperparameters.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks hyperparameters.json"):
        convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def damaged(weights, how, folder):
    if how == "a_pickle_that_runs":
        torch.save(weights | {"more": Hostile(folder / "ran")}, folder / "pytorch_model.bin")
    elif how == "cut_off":
        (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:900])
    elif how == "nothing":
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif how == "numbers":
        torch.save({"a": 1}, folder / "pytorch_model.bin")
    elif how == "no_json":
        (folder / "hyperparameters.json").write_text("{")
    elif how == "a_list":
        (folder / "config.json").write_text("[]")
    else:
        name = "bert.encoder.layer.0.attention.self.query.bias"
        change = {
            "another_shape": {name: weights[name][:3]},
            "a_key_more": {"classification_heads.first.weight": weights[name]},
            "a_head_more": {"classification_heads.7.bias": weights[name]},
        }
        torch.save(weights | change[how], folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("a_pickle_that_runs", UnsafePickleError, "nothing of it was executed"),
        ("cut_off", CheckpointError, "the weights cannot be read"),
        ("nothing", CheckpointError, r"the weights cannot be read \(EOFError\)"),
        ("numbers", CheckpointError, "other things than tensors by name"),
        ("no_json", CheckpointError, r"hyperparameters\.json cannot be read: it is not JSON"),
        ("a_list", CheckpointError, r"config\.json holds a JSON list"),
        ("another_shape", CheckpointError, r"query.bias has shape \(3,\) for \(16,\)"),
        ("a_key_more", CheckpointError, r"classification_heads.first.weight is unknown"),
        ("a_head_more", CheckpointError, r"classification_heads.7.bias is unknown"),
    ],
)
def test_damaged_multi_task_folders_are_refused(multi_task, tokenizer, tmp_path, how, error, message):
    folder, plain = multi_task
    damaged(plain.state_dict(), how, folder)
    with pytest.raises(error, match=message):
        convert_multi_task(folder, tmp_path / "out", tokenizer=tokenizer)
    assert not (folder / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_tokenized_folder_of_upstream_is_a_dataset_like_any(model_folder, cells, tokenizer, tmp_path):
    """Its columns are input_ids, length and attributes; there are no cell ids and no record."""
    made = load_cells(cells, tokenizer=tokenizer)
    plain = datasets.Dataset.from_dict({"input_ids": made["input_ids"][:], "length": made["length"][:], "cell_type": [str(v) for v in cells.obs["cell_type"]]})
    plain.save_to_disk(tmp_path / "cells.dataset")
    expected = embed_cells(model_folder, cells, progress=False)
    np.testing.assert_allclose(embed_cells(model_folder, tmp_path / "cells.dataset", progress=False), expected, atol=SAME_MODEL)
    assert main(["embed", str(tmp_path / "cells.dataset"), "--model", str(model_folder), "--output", str(tmp_path / "out.parquet")]) == 0
