"""Checkpoints opened from the Hub by the real client: by repository, subfolder, revision, offline, and while things go wrong."""

import copy
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer, embed_cells, load_model
from geneformer_hf.errors import CheckpointError, HubError, UnsafePickleError
from geneformer_hf.models.loading import load_tokenizer, tokenizer_of
from geneformer_hf.models.places import Place
from tests.hub.server import Fault

WEIGHTS = "model.safetensors"


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_by_repository_through_every_door(hub, shared_model, model, tokenizer, cells):
    for opened in (GeneformerForMaskedLM.from_pretrained(shared_model), AutoModelForMaskedLM.from_pretrained(shared_model), load_model(shared_model)):
        assert same(model, opened)
        assert opened.config.name_or_path == opened.name_or_path == shared_model
        assert opened.place == Place(shared_model, None, hub.repositories["model", shared_model].refs["main"])
    for found in (GeneformerTokenizer.from_pretrained(shared_model), AutoTokenizer.from_pretrained(shared_model), tokenizer_of(opened)):
        assert type(found) is GeneformerTokenizer
        assert found.gene_table.fingerprint == tokenizer.gene_table.fingerprint
        assert found.name_or_path == shared_model
    assert (embed_cells(shared_model, cells, progress=False) == embed_cells(model, cells, tokenizer=tokenizer, progress=False)).all()


def test_what_transformers_pushes_is_what_opens(hub, model, tokenizer):
    model.push_to_hub("lab/pushed", private=True)
    tokenizer.push_to_hub("lab/pushed")
    assert hub.repositories["model", "lab/pushed"].private
    assert set(hub.files("lab/pushed")) == {"README.md", "config.json", "gene_table.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    opened = AutoModelForMaskedLM.from_pretrained("lab/pushed")
    assert same(model, opened)
    assert tokenizer_of(opened).get_vocab() == tokenizer.get_vocab()


def test_by_subfolder_and_revision(hub, model, model_folder, tokenizer):
    files = {f"small/{path.name}": path.read_bytes() for path in model_folder.iterdir()}
    first = hub.put("lab/several", files)
    other = GeneformerForMaskedLM(model.config)
    other.save_pretrained(model_folder)
    hub.put("lab/several", {f"small/{WEIGHTS}": (model_folder / WEIGHTS).read_bytes()})
    hub.repositories["model", "lab/several"].tags["v1"] = first
    for revision, expected in (("v1", model), (first, model), (None, other), ("main", other)):
        opened = load_model("lab/several", subfolder="small", revision=revision)
        assert same(expected, opened)
        # The tokenizer of the same commit, in the same subfolder.
        hub.requests.clear()
        assert tokenizer_of(opened).get_vocab() == tokenizer.get_vocab()
        assert not any("main" in path for _, path in hub.requests)
    with pytest.raises(HubError, match=r"lab/several has no revision 'v9'\. Give a branch, a tag or a commit"):
        load_model("lab/several", subfolder="small", revision="v9")
    with pytest.raises(CheckpointError, match=r"lab/several \(revision \w+\) holds no config\.json|lab/several holds no config\.json"):
        load_model("lab/several")


def test_what_from_pretrained_takes_elsewhere(hub, shared_model, model, model_folder, tmp_path):
    copy.deepcopy(model).half().save_pretrained(model_folder, variant="fp16")
    hub.put(shared_model, {"model.fp16.safetensors": (model_folder / "model.fp16.safetensors").read_bytes()})
    small = GeneformerForMaskedLM.from_pretrained(shared_model, variant="fp16", dtype=torch.float16)
    assert small.dtype == torch.float16
    opened, info = GeneformerForMaskedLM.from_pretrained(shared_model, output_loading_info=True, token="hf_owner", cache_dir=tmp_path / "elsewhere")
    assert same(model, opened)
    assert not info["missing_keys"]
    assert list((tmp_path / "elsewhere").rglob(WEIGHTS))
    again = AutoModelForMaskedLM.from_pretrained(shared_model, local_files_only=True, attn_implementation="eager", hidden_dropout_prob=0.3)
    assert (again.config._attn_implementation, again.config.hidden_dropout_prob) == ("eager", 0.3)
    n = len(hub.requests)
    assert same(model, load_model(shared_model, force_download=True))
    assert sum(method == "GET" and path.endswith(WEIGHTS) for method, path in hub.requests[n:]) == 1


def test_offline_from_the_cache_without_a_request(hub, shared_model, model, offline):
    load_model(shared_model)
    hub.requests.clear()
    offline()
    opened = AutoModelForMaskedLM.from_pretrained(shared_model)
    assert same(model, opened)
    assert tokenizer_of(opened).name_or_path == shared_model
    assert hub.requests == []
    with pytest.raises(HubError, match=r"lab/other cannot be downloaded: it is not whole in the cache, and the Hub may not be asked"):
        load_model("lab/other")


def test_the_cache_serves_while_the_hub_is_down(hub, shared_model, model):
    load_model(shared_model)
    hub.faults = [Fault("GET", "/api/", "status:503", times=100), Fault("HEAD", "", "status:503", times=100)]
    assert same(model, load_model(shared_model))


def test_nothing_but_settings_and_safetensors_is_fetched(hub, shared_model):
    hub.put(shared_model, {"training_args.bin": b"x", "pytorch_model.bin": b"x", "optimizer.pt": b"x", "modeling.py": b"boom()", "token_dictionary.pkl": b"x"})
    hub.requests.clear()
    load_model(shared_model)
    AutoTokenizer.from_pretrained(shared_model)
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if "/resolve/" in path and method == "GET"}
    assert fetched <= {"config.json", "gene_table.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def test_pickled_weights_are_read_as_tensors_alone(hub, model, model_folder, tmp_path):
    torch.save(model.state_dict(), model_folder / "pytorch_model.bin")
    (model_folder / WEIGHTS).unlink()
    hub.put("lab/old", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    assert same(model, load_model("lab/old"))

    class Hostile:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"bert": Hostile()}, model_folder / "pytorch_model.bin")
    hub.put("lab/hostile", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    with pytest.raises(UnsafePickleError, match="asks for more than tensors"):
        load_model("lab/hostile")
    assert not (tmp_path / "pwned").exists()


FAULTS = {
    "refused": ([Fault("GET", "/tree/|/api/models", "status:401", times=9)], "not on the Hub, or is private|token is not accepted"),
    "too_many": ([Fault("GET", "", "status:429", times=999), Fault("HEAD", "", "status:429", times=999)], r"the Hub answered 429"),
    "broken": ([Fault("GET", "", "status:500", times=999), Fault("HEAD", "", "status:500", times=999)], r"the Hub answered 500"),
    "hangs_up": ([Fault("GET", "", "hang up", times=999), Fault("HEAD", "", "hang up", times=999)], r"Server disconnected|the Hub cannot be reached"),
    "cut": ([Fault("GET", WEIGHTS, "cut:1000", times=999)], r"cannot be downloaded"),
    "short": ([Fault("GET", WEIGHTS, "size:100", times=999)], r"cannot be downloaded"),
    "flipped": (
        [Fault("GET", WEIGHTS, "flip")],
        r"model\.safetensors of lab/model is damaged: its [\d,]+ bytes do not have the hash \w{12}… that the Hub gave",
    ),
    "flipped_settings": ([Fault("GET", "config.json", "flip")], r"config\.json of lab/model is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_partial_is_ever_loaded(name, hub, shared_model, model, offline):
    hub.faults, words = FAULTS[name]
    with pytest.raises(HubError, match=words):
        load_model(shared_model)
    # Neither now from the cache, nor by the doors of transformers.
    for opening in (load_model, GeneformerForMaskedLM.from_pretrained):
        hub.faults, faults = [], hub.faults
        hub.faults = [Fault(f.method, f.path, f.what, 999) for f in faults]
        with pytest.raises(HubError):
            opening(shared_model)
    hub.faults = []
    assert same(model, load_model(shared_model))


def test_a_connection_that_is_cut_once_is_taken_up_again(hub, shared_model, model):
    hub.faults = [Fault("GET", WEIGHTS, "cut:20000")]
    assert same(model, load_model(shared_model))


def test_what_passes_is_tried_again(hub, shared_model, model):
    hub.faults = [Fault("HEAD", WEIGHTS, "status:429", times=2), Fault("GET", WEIGHTS, "status:429", times=2)]
    assert same(model, load_model(shared_model))


def test_damage_in_the_cache_is_found_offline_and_mended_online(hub, shared_model, model, offline):
    load_model(shared_model)
    blob = next(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob(WEIGHTS)).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    offline()
    with pytest.raises(HubError, match="is damaged"):
        load_model(shared_model)
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    assert same(model, load_model(shared_model))


def test_private_repositories_need_a_token(hub, shared_model, model, monkeypatch):
    hub.repositories["model", shared_model].private = True
    assert same(model, load_model(shared_model))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent/cache")
    with pytest.raises(HubError, match=r"lab/model is not on the Hub, or is private and this token may not see it.*hf auth login"):
        load_model(shared_model)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"lab/model cannot be downloaded: .*401|token is not accepted"):
        load_model(shared_model)


@pytest.mark.parametrize("name", ["model-1-of-/../../../../evil.safetensors", "model-1-of-\\..\\..\\evil.safetensors"])
def test_file_names_that_lead_out_are_refused(name, hub, shared_model, tmp_path):
    hub.put(shared_model, {name: b"evil"})
    with pytest.raises(HubError, match="cannot be downloaded: Invalid filename"):
        load_model(shared_model)
    assert not [path for path in tmp_path.rglob("*evil*") if path.is_file()]


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_subfolders_that_lead_out_are_refused(subfolder, model_folder):
    for name in (model_folder, "lab/model"):
        with pytest.raises(CheckpointError, match="leads out of"):
            load_model(name, subfolder=subfolder)


def test_a_plain_configuration_is_not_ours(hub, shared_model):
    assert AutoConfig.from_pretrained(shared_model).model_type == "geneformer"


def test_a_name_that_is_nothing(hub):
    with pytest.raises(
        CheckpointError, match=r"Geneformer-V9 does not exist \(looked for in .*\)\. Give .* or one of the published checkpoints: Geneformer-V1-10M"
    ):
        load_tokenizer("Geneformer-V9")
    with pytest.raises(HubError, match="lab/nothing is not on the Hub"):
        load_tokenizer("lab/nothing")
