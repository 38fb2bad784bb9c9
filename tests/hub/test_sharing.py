"""Folders to the Hub and back: what goes, what stays, and what happens when it breaks off."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments, pipeline

from geneformer_hf import (
    GeneformerFineTuningArguments,
    GeneformerForMaskedLM,
    GeneformerForSequenceClassification,
    add_adapter,
    embed_cells,
    finetune,
    load_cells,
    load_model,
    load_peft_model,
    predict,
    pull_folder,
    push_folder,
)
from geneformer_hf.cli.main import main
from geneformer_hf.data.tokenized import gene_table_of, open_tokenized, report_of, repository_of_cells
from geneformer_hf.errors import CellFileError, CheckpointError, HubError, OutputError, OutputExistsError, VocabularyMismatchError
from geneformer_hf.models.adapters import save_adapter
from geneformer_hf.models.loading import tokenizer_of
from geneformer_hf.outputs import MARK
from tests.conftest import make_cells
from tests.hub.server import Fault

WEIGHTS = "model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK}


def metadata(text: bytes) -> dict:
    return yaml.safe_load(text.decode().split("---\n", 2)[1])


@pytest.fixture
def dataset_folder(tmp_path, cells, tokenizer):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    load_cells(tmp_path / "cells.h5ad", tokenizer=tokenizer).save_to_disk(tmp_path / "tokens")
    return tmp_path / "tokens"


def test_a_model_there_and_back(hub, model_folder, tmp_path):
    (model_folder / "training_args.bin").write_bytes(b"pickle")
    (model_folder / "optimizer.pt").write_bytes(b"pickle")
    (model_folder / ".secret").write_text("x")
    pushed = push_folder(model_folder, "lab/new", private=True)
    repository = hub.repositories["model", "lab/new"]
    assert (repository.private, len(repository.commits), pushed.kind) == (True, 2, "model")
    assert pushed.left_out == [".secret", "optimizer.pt", "training_args.bin"]
    assert set(hub.files("lab/new")) == {"README.md", "config.json", "gene_table.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"} == set(pushed.files)
    assert metadata(hub.files("lab/new")["README.md"])["library_name"] == "transformers"
    pulled = pull_folder("lab/new", tmp_path / "pulled")
    assert (pulled.kind, pulled.revision, pulled.left_out) == ("model", pushed.revision, [])
    assert content(tmp_path / "pulled") == hub.files("lab/new")
    assert not list(tmp_path.glob(".pulled*"))
    with pytest.raises(OutputExistsError):
        pull_folder("lab/new", tmp_path / "pulled")


def test_private_is_not_a_wish(hub, model_folder, shared_model):
    with pytest.raises(HubError, match="lab/model is there already, and public: private is for a new repository"):
        push_folder(model_folder, shared_model, private=True)
    assert len(hub.repositories["model", shared_model].commits) == 2
    assert push_folder(model_folder, "lab/own", private=True).revision != push_folder(model_folder, "lab/own", private=True, message="again").url


def test_branches_and_pull_requests(hub, model_folder, tmp_path, model):
    push_folder(model_folder, "lab/new")
    torch.nn.init.zeros_(model.cls.predictions.bias)
    GeneformerForMaskedLM(model.config).save_pretrained(model_folder)
    push_folder(model_folder, "lab/new", revision="experiment")
    proposed = push_folder(model_folder, "lab/new", create_pr=True, message="A better one")
    assert proposed.url.endswith("/discussions/1")
    main_weights, branch, pr = (hub.files("lab/new", revision=r)[WEIGHTS] for r in ("main", "experiment", "refs/pr/1"))
    assert main_weights != branch == pr
    assert hub.repositories["model", "lab/new"].commits[-1].title == "A better one"
    for revision in ("experiment", "refs/pr/1"):
        assert (pull_folder("lab/new", tmp_path / revision.replace("/", "-"), revision=revision).output / WEIGHTS).read_bytes() == branch
    with pytest.raises(HubError, match=r"lab/new has no revision 'nowhere'"):
        pull_folder("lab/new", tmp_path / "x", revision="nowhere")


def test_weights_of_an_earlier_push_are_replaced(hub, model_folder, model):
    model.save_pretrained(model_folder, max_shard_size="20KB")
    (model_folder / WEIGHTS).unlink(missing_ok=True)
    push_folder(model_folder, "lab/new")
    assert any(name.startswith("model-00001-of") for name in hub.files("lab/new"))
    before = {name: tensor.clone() for name, tensor in load_model("lab/new").state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for path in model_folder.glob("model*"):
        path.unlink()
    model.save_pretrained(model_folder)
    push_folder(model_folder, "lab/new")
    assert [name for name in hub.files("lab/new") if name.startswith("model")] == [WEIGHTS]
    (model_folder / WEIGHTS).unlink()
    model.save_pretrained(model_folder, max_shard_size="20KB")
    next(model_folder.glob("model-00001-of*")).unlink()
    with pytest.raises(CheckpointError, match="1 files of weights are missing"):
        push_folder(model_folder, "lab/new")


def test_a_tokenizer_alone(hub, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert push_folder(tmp_path / "tokenizer", "lab/tokenizer").kind == "tokenizer"
    assert pull_folder("lab/tokenizer", tmp_path / "pulled").kind == "tokenizer"
    assert main(["info", str(tmp_path / "pulled")]) == 0
    assert "Tokenizer: 60 human genes" in capsys.readouterr().out


def test_a_fine_tuned_model_has_its_card_and_no_path_of_this_machine(hub, tune, tmp_path, labelled):
    run = tune(group_column="donor")
    pushed = push_folder(run.folder, "lab/tuned")
    files = hub.files("lab/tuned")
    assert {"README.md", "figures.json", "report.html", "settings.yaml", "predictions.csv"} <= set(pushed.files)
    for name, found in files.items():
        assert str(tmp_path).encode() not in found, name
        assert b"/pytest-of-" not in found, name
    said = metadata(files["README.md"])
    assert said["model-index"][0]["results"][0]["metrics"]
    assert b"Every donor is wholly on one side." in files["README.md"]
    assert b"Seed 42. Made with geneformer-hf" in files["README.md"]
    assert predict("lab/tuned", labelled, progress=False).labels.tolist() == predict(run.folder, labelled, progress=False).labels.tolist()


@pytest.fixture(scope="session")
def trained_adapter(tmp_path_factory, base, labelled):
    arguments = GeneformerFineTuningArguments(
        str(tmp_path_factory.mktemp("adapter") / "run"), from_checkpoint=str(base), label=["cell_type"], adapter="lora", num_train_epochs=1,
        per_device_train_batch_size=8, learning_rate=1e-2, disable_tqdm=True, baselines=False,
    )  # fmt: skip
    return finetune(arguments, labelled).folder


@pytest.fixture
def adapter(trained_adapter, tmp_path):
    return Path(shutil.copytree(trained_adapter, tmp_path / "adapted" / "model"))


def test_an_adapter_of_a_folder_needs_to_know_where_that_is(hub, adapter, base, labelled, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"was trained on .*, a folder of this disk, which nobody else has\. Push that first, and name it with `base=` \(--base\)"
    ):
        push_folder(adapter, "lab/adapter")
    assert ("model", "lab/adapter") not in hub.repositories
    push_folder(base, "lab/base")
    pushed = push_folder(adapter, "lab/adapter", base="lab/base")
    assert (pushed.kind, pushed.base.name) == ("adapter", "lab/base")
    files = hub.files("lab/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "lab/base"
    assert metadata(files["README.md"])["base_model"] == "lab/base"
    assert WEIGHTS not in files
    assert not [name for name, found in files.items() if str(base).encode() in found]
    # The folder itself still names the base on this disk.
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    expected = predict(adapter, labelled, progress=False).to_frame()
    assert predict("lab/adapter", labelled, progress=False).to_frame().equals(expected)
    pulled = pull_folder("lab/adapter", tmp_path / "pulled")
    assert (pulled.kind, pulled.base.name) == ("adapter", "lab/base")
    assert predict(tmp_path / "pulled", labelled, progress=False).to_frame().equals(expected)


def test_an_adapter_finds_the_commit_it_was_trained_on(hub, base, tokenizer, tmp_path, caplog):
    push_folder(base, "lab/base")
    commit = hub.repositories["model", "lab/base"].refs["main"]
    model = load_model("lab/base")
    save_adapter(add_adapter(model), tmp_path / "adapter")
    # The base goes on; the adapter stays with what it knows.
    moved = tmp_path / "moved"
    torch.manual_seed(9)
    GeneformerForMaskedLM(model.config).save_pretrained(moved)
    hub.put("lab/base", {WEIGHTS: (moved / WEIGHTS).read_bytes()})
    assert push_folder(tmp_path / "adapter", "lab/adapter").base.revision == commit
    with caplog.at_level("INFO", logger="geneformer_hf"):
        opened = load_peft_model("lab/adapter")
    assert f"is an adapter of the model lab/base (revision {commit}), which is opened with it." in caplog.text
    weight = opened.get_base_model().bert.embeddings.word_embeddings.weight
    assert torch.equal(weight, load_model(base).bert.embeddings.word_embeddings.weight)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        load_peft_model("lab/adapter", base="lab/base")


def test_a_dataset_there_and_back(hub, dataset_folder, tmp_path, model, tokenizer):
    pushed = push_folder(dataset_folder, "lab/cells")
    files = hub.files("lab/cells", "dataset")
    assert set(files) == {"README.md", "report.json", "data/train-00000-of-00001.parquet"} == set(pushed.files)
    assert len(hub.repositories["dataset", "lab/cells"].commits) == 2
    assert not [name for name, found in files.items() if str(tmp_path).encode() in found]
    assert metadata(files["README.md"])["size_categories"] == ["n<1K"]
    assert b"| cells.h5ad | 30 |" in files["README.md"]
    before = open_tokenized(dataset_folder)
    # As anybody loads it, with datasets alone: the record of the vocabulary is there.
    anybody = datasets.load_dataset("lab/cells", split="train")
    assert anybody.to_dict() == before.to_dict()
    assert gene_table_of(anybody) == tokenizer.gene_table.fingerprint
    streamed = datasets.load_dataset("lab/cells", split="train", streaming=True)
    assert next(iter(streamed))["input_ids"] == before[0]["input_ids"]
    pull_folder("lab/cells", tmp_path / "pulled")
    after = datasets.load_from_disk(str(tmp_path / "pulled"))
    assert after.to_dict() == before.to_dict()
    assert after.features == before.features
    assert report_of(after)["files"][0]["file"] == "cells.h5ad"
    assert report_of(after)["encoding"] == report_of(before)["encoding"]
    assert (embed_cells(model, after, tokenizer=tokenizer, progress=False) == embed_cells(model, before, tokenizer=tokenizer, progress=False)).all()


def test_what_is_made_of_a_dataset_on_the_hub_names_it(hub, dataset_folder, tmp_path, tune, run, labelled, tokenizer):
    cells = load_cells(labelled, tokenizer=tokenizer, obs=["cell_type"], keep_counts=True, cache_dir=tmp_path / "cache")
    cells.save_to_disk(tmp_path / "labelled")
    assert push_folder(tmp_path / "labelled", "labelled").repository == "lab/labelled"
    push_folder(dataset_folder, "lab/cells")
    pull_folder("lab/cells", tmp_path / "pulled")
    tuned = tune("tuned", cells=datasets.load_dataset("lab/labelled", split="train"), num_train_epochs=1)
    for more in ({}, {"eval_paths": [str(dataset_folder)]}):
        trained = run(f"trained{len(more)}", data=False, train_data=[str(tmp_path / "pulled")], max_steps=1, **more)
        assert metadata((trained.folder / "README.md").read_bytes())["datasets"] == ["lab/cells"]
    assert metadata((tuned.folder / "README.md").read_bytes())["datasets"] == ["lab/labelled"]
    # A folder of this disk is nothing to name.
    assert "datasets" not in metadata((tune("local", num_train_epochs=1).folder / "README.md").read_bytes())
    assert repository_of_cells(open_tokenized(dataset_folder)) is None


def test_what_lies_beside_the_tables_of_a_dataset_goes_along(hub, dataset_folder, tmp_path):
    beside = {"LICENSE": "Ours.", "sub/donors.csv": "donor,age\n", "settings.yaml": f"files: {tmp_path}/cells.h5ad\n"}
    for name, text in beside.items():
        (dataset_folder / name).parent.mkdir(exist_ok=True)
        (dataset_folder / name).write_text(text)
    (dataset_folder / "run.py").write_text("boom()")
    pushed = push_folder(dataset_folder, "lab/cells")
    assert pushed.is_new
    assert pushed.left_out == ["run.py"]
    assert set(pushed.files) == {"README.md", "report.json", "data/train-00000-of-00001.parquet", *beside}
    assert hub.files("lab/cells", "dataset")["settings.yaml"] == b"files: cells.h5ad\n"
    # Of a repository nothing takes the place of what datasets itself writes.
    hub.put("lab/cells", {"state.json": b"{}", "dataset_dict.json": b"{}"}, kind="dataset")
    pull_folder("lab/cells", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "sub" / "donors.csv").read_text() == "donor,age\n"
    assert open_tokenized(tmp_path / "pulled").to_dict() == open_tokenized(dataset_folder).to_dict()
    assert not push_folder(tmp_path / "pulled", "lab/again").left_out
    assert not push_folder(tmp_path / "pulled", "lab/again").is_new


def test_offline_nothing_is_pushed(hub, model_folder, offline):
    offline()
    with pytest.raises(HubError, match=r"^lab/new cannot be written: the Hub may not be asked\. Check the network \(and HF_HUB_OFFLINE\)\.$"):
        push_folder(model_folder, "lab/new")


def test_a_shared_dataset_of_another_vocabulary_is_refused(hub, dataset_folder, v1_model, v1_tokenizer):
    push_folder(dataset_folder, "lab/cells")
    with pytest.raises(VocabularyMismatchError, match="gene table"):
        embed_cells(v1_model, datasets.load_dataset("lab/cells", split="train"), tokenizer=v1_tokenizer, progress=False)


@pytest.mark.parametrize("path", ["{secret}", "../../../{name}", "http://127.0.0.1:1/x.parquet", "*.txt"])
def test_a_card_cannot_name_files_of_this_disk(path, hub, dataset_folder, tmp_path):
    secret = tmp_path / "secret.parquet"
    datasets.Dataset.from_dict({"secret": ["mine"]}).to_parquet(str(secret))
    push_folder(dataset_folder, "lab/cells")
    told = path.format(secret=secret, name=secret.name)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {told!r}\n---\n"
    hub.put("lab/cells", {"README.md": card.encode()}, kind="dataset")
    pull_folder("lab/cells", tmp_path / "pulled")
    assert datasets.load_from_disk(str(tmp_path / "pulled")).column_names[:2] == ["input_ids", "length"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("report.json", b"{", r"report\.json cannot be read: it is not JSON"),
        ("report.json", b"[1]", r"report\.json holds a JSON list"),
        ("report.json", b'{"a": "\xff"}', r"report\.json is not text in UTF-8"),
        ("README.md", b"# cells \xff", r"README\.md is not text in UTF-8"),
        ("README.md", b"---\na: [\n---\n", "metadata of the card are damaged"),
    ],
)
def test_damaged_text_of_a_dataset(name, content, words, hub, dataset_folder, tmp_path):
    push_folder(dataset_folder, "lab/cells")
    files = {**hub.files("lab/cells", "dataset"), name: content}
    if name == "README.md":
        del files["report.json"]
        hub.repositories.clear()
    hub.put("lab/cells", files, kind="dataset")
    with pytest.raises((CheckpointError, CellFileError), match=words):
        pull_folder("lab/cells", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_splits_and_a_card_of_ones_own(hub, dataset_folder, tmp_path):
    both = datasets.load_from_disk(str(dataset_folder)).train_test_split(0.2, seed=0)
    both.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "both" / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [blood]\n---\n\n# Our cells\n\nFrom us.\n")
    push_folder(tmp_path / "both", "lab/both")
    card = hub.files("lab/both", "dataset")["README.md"]
    assert (metadata(card)["license"], metadata(card)["tags"]) == ("cc-by-4.0", ["blood"])
    assert b"# Our cells\n\nFrom us." in card
    found = datasets.load_dataset("lab/both")
    assert {name: len(split) for name, split in found.items()} == {"train": 24, "test": 6}
    pull_folder("lab/both", tmp_path / "pulled")
    assert datasets.load_from_disk(str(tmp_path / "pulled"))["test"].to_dict() == both["test"].to_dict()
    # Fewer splits: tables of the first push do not stay.
    push_folder(tmp_path / "both" / "test", "lab/both")
    assert [name for name in hub.files("lab/both", "dataset") if name.endswith(".parquet")] == ["data/train-00000-of-00001.parquet"]


def test_datasets_push_to_hub_works_as_well(hub, dataset_folder, model, tokenizer):
    dataset = datasets.load_from_disk(str(dataset_folder))
    dataset.push_to_hub("lab/plain", num_shards=3)
    again = datasets.load_dataset("lab/plain", split="train")
    assert again.to_dict() == dataset.to_dict()
    assert (embed_cells(model, again, tokenizer=tokenizer, progress=False) == embed_cells(model, dataset, tokenizer=tokenizer, progress=False)).all()


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_peft_pushes_an_adapter_alone(hub, base, tmp_path):
    push_folder(base, "lab/base")
    adapted = add_adapter(load_model("lab/base"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    adapted.push_to_hub("lab/plain-adapter")
    assert WEIGHTS not in hub.files("lab/plain-adapter")
    opened = load_peft_model("lab/plain-adapter")
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in adapted.state_dict().items())
    # What peft alone leaves out is there: the base by its commit, and its fingerprint.
    said = json.loads(hub.files("lab/plain-adapter")["adapter_config.json"])
    assert (said["base_model_name_or_path"], said["revision"]) == ("lab/base", hub.repositories["model", "lab/base"].refs["main"])
    assert "geneformer_base" in json.loads(hub.files("lab/plain-adapter")["config.json"])
    with pytest.raises(CheckpointError, match=r"this adapter is of .*base.*, which nobody else has"):
        add_adapter(load_model(base)).push_to_hub("lab/leak")
    assert ("model", "lab/leak") not in hub.repositories


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_of_peft_alone(hub, base):
    """Without a configuration of ours: how many classes there are shows in its weights."""
    push_folder(base, "lab/base")
    headed = GeneformerForSequenceClassification.from_pretrained("lab/base", num_labels=5)
    peft.get_peft_model(headed, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])).push_to_hub(
        "lab/plain-classifier"
    )
    assert "config.json" not in hub.files("lab/plain-classifier")
    opened = load_model("lab/plain-classifier")
    assert (type(opened), opened.config.num_labels) == (GeneformerForSequenceClassification, 5)


def test_an_adapter_knows_the_subfolder_of_its_base(hub, base, tmp_path):
    torch.manual_seed(8)
    config = load_model(base).config
    for name in ("", "small/"):
        GeneformerForMaskedLM(config).save_pretrained(tmp_path / "weights")
        hub.put("lab/two", {f"{name}{path.name}": path.read_bytes() for path in (tmp_path / "weights").iterdir()})
    add_adapter(load_model("lab/two", subfolder="small")).push_to_hub("lab/of-small")
    opened = load_model("lab/of-small").bert.embeddings.word_embeddings.weight
    assert torch.equal(opened, load_model("lab/two", subfolder="small").bert.embeddings.word_embeddings.weight)
    assert not torch.equal(opened, load_model("lab/two").bert.embeddings.word_embeddings.weight)


def test_an_adapter_on_the_hub_through_the_auto_classes(hub, base, adapter, labelled, tokenizer):
    push_folder(base, "lab/base")
    push_folder(adapter, "lab/adapter", base="lab/base")
    opened = AutoModelForSequenceClassification.from_pretrained("lab/adapter")
    assert opened.config.id2label == load_model(adapter).config.id2label
    expected = predict(adapter, labelled, progress=False).to_frame()
    assert predict(opened, labelled, tokenizer=tokenizer, progress=False).to_frame().equals(expected)
    _, info = GeneformerForSequenceClassification.from_pretrained("lab/adapter", output_loading_info=True)
    assert info["missing_keys"] == []
    found = pipeline("cell-classification", model=load_model("lab/adapter"), tokenizer=tokenizer, device="cpu")(labelled)
    assert list(found.iloc[:, 0]) == list(expected.iloc[:, 0])
    by_name = pipeline("cell-classification", model="lab/adapter", device="cpu")
    assert by_name.model.place.name == "lab/adapter"
    assert by_name(labelled).equals(found)
    # It would be written with names that nothing reads.
    with pytest.raises(CheckpointError, match="has an adapter at work inside"):
        opened.save_pretrained(adapter.parent / "broken")


def test_what_others_put_there_stays(hub, model_folder, tokenizer, adapter, base, tmp_path):
    """A tokenizer or an adapter does not take the place of weights, nor a generated card that of a written one."""
    push_folder(model_folder, "lab/model")
    hub.put("lab/model", {"README.md": b"---\nlicense: mit\n---\n\nOurs.\n", "LICENSE": b"text"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    push_folder(tmp_path / "tokenizer", "lab/model")
    assert WEIGHTS in hub.files("lab/model")
    push_folder(base, "lab/base")
    with pytest.raises(HubError, match="lab/model holds a model, and an adapter beside it would not be opened"):
        push_folder(adapter, "lab/model", base="lab/base")
    push_folder(adapter, "lab/adapter", base="lab/base")
    with pytest.raises(HubError, match="lab/adapter holds an adapter, and a model beside it would not be opened"):
        push_folder(model_folder, "lab/adapter")
    with pytest.raises(OutputError, match="which writing there would replace"):
        pull_folder("lab/model", Path.cwd(), overwrite=True)
    (model_folder / "LICENSE").write_text("text")
    push_folder(model_folder, "lab/third")
    assert "LICENSE" in hub.files("lab/third")
    hub.put("lab/third", {"README.md": b"---\nlicense: mit\n---\n\nOurs.\n"})
    push_folder(model_folder, "lab/third", message="again")
    assert b"Ours." in hub.files("lab/third")["README.md"]


def test_a_base_has_to_be_on_the_hub(hub, adapter, base):
    with pytest.raises(CheckpointError, match="is a folder of this disk, which nobody else has"):
        push_folder(adapter, "lab/adapter", base=str(base))
    with pytest.raises(HubError, match="lab/never-was is not on the Hub"):
        push_folder(adapter, "lab/adapter", base="lab/never-was")
    assert not hub.repositories


def test_folders_of_a_run_and_paths_stay_here(hub, model_folder, tmp_path):
    (model_folder / "checkpoint-5").mkdir()
    (model_folder / "checkpoint-5" / "config.json").write_text("{}")
    (model_folder / "sub").mkdir()
    for place in (model_folder, model_folder / "sub"):
        (place / "settings.yaml").write_text(f"train_data: {tmp_path}/patients.h5ad\nother: 'C:\\Users\\me\\x.csv'\nbase: lab/base\n")
    pushed = push_folder(model_folder, "lab/run")
    assert "checkpoint-5/config.json" in pushed.left_out
    for name in ("settings.yaml", "sub/settings.yaml"):
        assert yaml.safe_load(hub.files("lab/run")[name]) == {"train_data": "patients.h5ad", "other": "x.csv", "base": "lab/base"}
    for content, words in ((b"a: [", "is damaged"), (b"a: \xff", "is not text in UTF-8")):
        (model_folder / "settings.yaml").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"settings\.yaml {words}"):
            push_folder(model_folder, "lab/run")


FRESH = """
import json, sys
import datasets, torch
import anndata
import geneformer_hf
from transformers import AutoModelForMaskedLM, AutoTokenizer
adata = anndata.read_h5ad(sys.argv[1])
found = {"model": float(AutoModelForMaskedLM.from_pretrained("lab/new").cls.predictions.bias.detach().double().sum()), "tokens": AutoTokenizer.from_pretrained("lab/new")(adata)["input_ids"],
    "embedded": geneformer_hf.embed_cells("lab/new", datasets.load_dataset("lab/cells", split="train"), progress=False).tolist(),
    "adapted": geneformer_hf.predict("lab/adapter", adata, progress=False).labels.tolist()}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_artefact_opens_in_a_fresh_process_online_and_offline(hub, model_folder, dataset_folder, adapter, base, cells, tokenizer, model, tmp_path):
    for folder, name, of in (
        (model_folder, "lab/new", None),
        (dataset_folder, "lab/cells", None),
        (base, "lab/base", None),
        (adapter, "lab/adapter", "lab/base"),
    ):
        push_folder(folder, name, base=of)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_owner"}
    for offline in ("0", "1"):
        hub.requests.clear()
        done = subprocess.run(
            [sys.executable, "-c", FRESH, str(tmp_path / "cells.h5ad")],
            env=environment | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["tokens"] == tokenizer(cells)["input_ids"]
        assert found["model"] == float(model.cls.predictions.bias.detach().double().sum())
        assert np.allclose(found["embedded"], embed_cells(model, cells, tokenizer=tokenizer, progress=False), atol=1e-6)
        assert found["adapted"] == predict(adapter, cells, progress=False).labels.tolist()
        assert bool(hub.requests) == (offline == "0")


def test_the_trainer_of_transformers_pushes(hub, base, tokenizer, labelled, tmp_path):
    cells = (
        load_cells(labelled, tokenizer=tokenizer, cache_dir=tmp_path / "cache").select_columns(["input_ids"]).select(range(8)).add_column("labels", [0, 1] * 4)
    )
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=1, hub_model_id="lab/trained", report_to=[], disable_tqdm=True, use_cpu=True, per_device_train_batch_size=4
    )
    model = GeneformerForSequenceClassification.from_pretrained(base, num_labels=2)
    trainer = Trainer(model, arguments, train_dataset=cells, processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    trainer.push_to_hub()
    opened = load_model("lab/trained")
    assert all(torch.equal(tensor, opened.state_dict()[name].cpu()) for name, tensor in trainer.model.state_dict().items())
    assert tokenizer_of(opened).get_vocab() == tokenizer.get_vocab()


def test_an_upload_that_broke_off_goes_on(hub, model_folder, model, tmp_path):
    model.save_pretrained(model_folder, max_shard_size="20KB")
    (model_folder / WEIGHTS).unlink(missing_ok=True)
    n_files = len(list(model_folder.glob("model-*")))
    # The last of the files is never taken.
    oid = hashlib.sha256(sorted(model_folder.glob("model-*"))[-1].read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", oid, "status:500", times=99)]
    with pytest.raises(HubError, match=r"lab/new cannot be written"):
        push_folder(model_folder, "lab/new")
    assert not hub.files("lab/new")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model("lab/new")
    n_there = len(hub.objects)
    hub.faults, hub.requests[:] = [], []
    push_folder(model_folder, "lab/new")
    assert n_there == n_files - 1
    assert sum(method == "PUT" for method, _ in hub.requests) == 1
    assert len(hub.repositories["model", "lab/new"].commits) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("POST", "/commit/", "status:403"), "This token may not do that"),
        (Fault("POST", "/api/repos/create", "status:401"), "not accepted|private"),
        (Fault("POST", "/commit/", "status:500", times=99), "the Hub answered 500"),
        (Fault("POST", "/commit/", "hang up", times=99), "cannot be written: Server disconnected"),
        (Fault("POST", "/preupload/", "status:429", times=99), "the Hub answered 429"),
    ],
    ids=lambda value: value.what + value.path.replace("/", "-") if isinstance(value, Fault) else "",
)
def test_a_push_that_fails_makes_no_commit(fault, words, hub, model_folder):
    hub.faults = [fault]
    with pytest.raises(HubError, match=words):
        push_folder(model_folder, "lab/new")
    assert all(len(one.commits) == 1 for one in hub.repositories.values())


@pytest.mark.parametrize("what", ["cut:1000", "size:100", "flip", "status:500", "hang up"])
def test_a_pull_that_fails_leaves_no_folder_and_goes_on(what, hub, shared_model, tmp_path):
    hub.faults = [Fault("GET", WEIGHTS, what, times=99)]
    with pytest.raises(HubError):
        pull_folder(shared_model, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    hub.faults, hub.requests[:] = [], []
    pull_folder(shared_model, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == hub.files(shared_model)
    # What had come was kept.
    assert not [path for method, path in hub.requests if method == "GET" and path.endswith("gene_table.json")]
    assert not list(tmp_path.glob(".pulled*"))


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json"])
def test_names_that_lead_out_are_refused(name, hub, shared_model, tmp_path):
    hub.put(shared_model, {name: b"{}"})
    with pytest.raises(HubError, match="leads out of the folder"):
        pull_folder(shared_model, tmp_path / "in" / "pulled")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"its weights are pickles \(pytorch_model\.bin\); open it with load_model, and save it"),
        ({"modeling.py": b"boom()"}, r"it holds none of model\.safetensors, adapter_config\.json and gene_table\.json"),
        ({"model.safetensors": b"x", "geneformer/token_dictionary.pkl": b"x"}, r"laid out as the published checkpoints are.*geneformer-hf convert lab/odd"),
    ],
)
def test_what_cannot_be_pulled(files, words, hub, tmp_path):
    hub.put("lab/odd", files)
    with pytest.raises(CheckpointError, match=words):
        pull_folder("lab/odd", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_model_and_a_dataset_of_one_name(hub, shared_model, dataset_folder, tmp_path):
    push_folder(dataset_folder, shared_model)
    with pytest.raises(HubError, match=r"is a model and a dataset\. Say which"):
        pull_folder(shared_model, tmp_path / "pulled")
    assert pull_folder(shared_model, tmp_path / "pulled", kind="dataset").kind == "dataset"


def test_what_is_not_pushed(hub, model_folder, tmp_path, tokenizer, v1_tokenizer):
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "empty", "is not the folder of a model"),
        (tmp_path / "gone", "is not a folder"),
        (model_folder / "config.json", "is not a folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            push_folder(folder, "lab/new")
    with pytest.raises(CheckpointError, match="is no adapter"):
        push_folder(model_folder, "lab/new", base="lab/base")
    (model_folder / "outside.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="is a link to"):
        push_folder(model_folder, "lab/new")
    (model_folder / "outside.json").unlink()
    v1_tokenizer.save_pretrained(model_folder)
    with pytest.raises(VocabularyMismatchError):
        push_folder(model_folder, "lab/new")
    tokenizer.save_pretrained(model_folder)
    (model_folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        push_folder(model_folder, "lab/new")
    (model_folder / WEIGHTS).rename(model_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds its weights as pickles"):
        push_folder(model_folder, "lab/new")
    assert not hub.repositories


@pytest.mark.parametrize(("name", "words"), [("others/model", "This token may not do that"), ("not a name!", "is no name of a repository")])
def test_names_one_may_not_use(name, words, hub, model_folder):
    with pytest.raises(HubError, match=words):
        push_folder(model_folder, name)


def test_by_command(hub, model_folder, tmp_path, capsys):
    (model_folder / "training_args.bin").write_bytes(b"x")
    assert main(["push", str(model_folder), "lab/new", "--private"]) == 0
    said = capsys.readouterr().out
    assert "model of 6 files" in said
    assert "there already" not in said
    assert "Left here, as nothing of the kind is shared: training_args.bin" in said
    assert main(["pull", "lab/new", str(tmp_path / "pulled")]) == 0
    assert "opens with the Auto classes" in capsys.readouterr().out
    assert main(["pull", "lab/new", str(tmp_path / "pulled")]) == 1
    assert "exists. Choose another name, or pass --overwrite" in capsys.readouterr().err
    assert main(["pull", "lab/none", str(tmp_path / "other")]) == 1
    assert "geneformer-hf pull: lab/none is not on the Hub" in capsys.readouterr().err
    assert main(["info", "lab/new"]) == 0
    assert "GeneformerForMaskedLM" in capsys.readouterr().out


def test_embedding_by_command_from_the_hub(hub, shared_model, tmp_path, cells):
    make_cells([*cells.var_names], 5).write_h5ad(tmp_path / "few.h5ad")
    assert main(["embed", str(tmp_path / "few.h5ad"), "--model", shared_model, "--output", str(tmp_path / "out.h5ad")]) == 0
