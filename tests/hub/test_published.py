"""The published repository as it is laid out, on the stand-in: subfolders, a default model in the root, pickled dictionaries beside the code."""

import json
import pickle

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from geneformer_hf import CHECKPOINTS, GeneformerConfig, GeneformerForMaskedLM, GeneformerTokenizer, convert_checkpoint, embed_cells, load_model
from geneformer_hf.errors import CheckpointError, HubError, UnsafePickleError, VocabularyMismatchError
from geneformer_hf.models import checkpoints, configuration_geneformer, dictionaries
from geneformer_hf.models.checkpoints import REPOSITORY
from geneformer_hf.models.loading import load_tokenizer, require_same_vocabulary, tokenizer_of
from tests.conftest import ensembl, make_cells
from tests.unit.test_checkpoints import SHAPE, Hostile, write_dictionaries

PRESET = "Geneformer-V2-104M"
PINNED = CHECKPOINTS[PRESET].revision


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """Both generations, small: a V2 model in the root and in a subfolder, a V1 model in another."""
    root = tmp_path / "published"
    v2 = write_dictionaries(root / "geneformer", "_gc104M")
    v1 = write_dictionaries(root / "geneformer" / "gene_dictionaries_30m", "_gc30M", ("<pad>", "<mask>"), n=15)
    for seed, (folder, size) in enumerate(((".", v2), (CHECKPOINTS[PRESET].subfolder, v2), ("Geneformer-V1-10M", v1))):
        torch.manual_seed(seed)
        BertForMaskedLM(BertConfig(vocab_size=size, **SHAPE)).save_pretrained(root / folder)
    tables = {}
    for version, size in (("V1", v1), ("V2", v2)):
        found = dictionaries.find_dictionaries(root, size, allow_unknown=True)
        monkeypatch.setitem(checkpoints.DICTIONARY_HASHES, version, {kind: dictionaries.sha256(path) for kind, path in found.items()})
        tables[size] = dictionaries.table_of(found)[0].fingerprint
    monkeypatch.setattr("geneformer_hf.models.modeling_geneformer.PUBLISHED_TABLES", tables)
    monkeypatch.setitem(configuration_geneformer.CLS_EOS_OF_VOCABULARY, v2, (2, 3))
    (root / "geneformer" / "tokenizer.py").write_text("boom()")
    (root / "training_args.bin").write_bytes(b"x")
    hub.put(REPOSITORY, {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}, sha=PINNED)
    return root


def test_by_the_name_of_a_preset(hub, published):
    model = GeneformerForMaskedLM.from_pretrained(PRESET)
    plain = BertForMaskedLM.from_pretrained(published / PRESET)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert (model.config.model_type, model.config.name_or_path, model.place.subfolder) == ("geneformer", REPOSITORY, PRESET)
    assert GeneformerConfig.from_pretrained(PRESET).hidden_size == 16
    tokenizer = GeneformerTokenizer.from_pretrained(PRESET)
    assert (len(tokenizer), tokenizer.cls_token_id, tokenizer.model_max_length) == (24, 2, 64)
    assert tokenizer_of(model).gene_table.fingerprint == tokenizer.gene_table.fingerprint == model.config.vocabulary_fingerprint
    cells = make_cells([ensembl(i) for i in range(1, 21)], 5)
    assert (embed_cells(PRESET, cells, pooling="mean", progress=False) == embed_cells(model, cells, tokenizer=tokenizer, pooling="mean", progress=False)).all()
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert not [path for path in fetched if path.endswith((".py", ".bin"))]


def test_by_repository_and_subfolder_and_the_root_is_the_default(published):
    for subfolder in (PRESET, None, "Geneformer-V1-10M"):
        model = GeneformerForMaskedLM.from_pretrained(REPOSITORY, subfolder=subfolder)
        plain = BertForMaskedLM.from_pretrained(published / (subfolder or ""))
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, plain.bert.embeddings.word_embeddings.weight)
        tokenizer = tokenizer_of(model)
        assert len(tokenizer) == model.config.vocab_size
        require_same_vocabulary(model.config, tokenizer)


def test_the_root_alone_is_fetched_for_the_default(hub, published):
    load_model(REPOSITORY)
    assert not [path for _, path in hub.requests if "/resolve/" in path and "Geneformer-V" in path]


def test_the_wrong_vocabulary_is_never_silent(published):
    model = load_model(REPOSITORY, subfolder="Geneformer-V1-10M")
    cells = make_cells([ensembl(i) for i in range(1, 16)], 3)
    with pytest.raises(VocabularyMismatchError, match="the model has 17 tokens and the tokenizer 24"):
        embed_cells(model, cells, tokenizer=GeneformerTokenizer.from_pretrained(PRESET), progress=False)
    # Of the same size, with other medians.
    other = GeneformerTokenizer.from_pretrained("Geneformer-V1-10M")
    table = other.gene_table
    swapped = GeneformerTokenizer(gene_table=type(table)(table.ensembl_ids, table.token_ids, table.medians * 2), model_max_length=64)
    with pytest.raises(VocabularyMismatchError, match="the model was made for gene table"):
        embed_cells(model, cells, tokenizer=swapped, progress=False)
    # What AutoTokenizer makes of a published folder: five tokens of BERT.
    stranger = AutoTokenizer.from_pretrained(published / PRESET)
    with pytest.raises(VocabularyMismatchError, match=r"tokenizer is a BertTokenizer of 5 tokens, no gene tokenizer\. AutoTokenizer makes"):
        embed_cells(load_model(PRESET), cells, tokenizer=stranger, progress=False)


def test_conversion_from_the_hub_is_pinned_to_its_commit(hub, published, tmp_path):
    done = convert_checkpoint(PRESET, tmp_path / "out")
    assert (done.version, done.n_genes) == ("V2", 20)
    commit = hub.repositories["model", REPOSITORY].refs["main"]
    said = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (said["name"], said["subfolder"], said["revision"]) == (REPOSITORY, PRESET, commit)
    assert f"{REPOSITORY}, {PRESET}, revision {commit}" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == GeneformerTokenizer.from_pretrained(PRESET).get_vocab()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.cls.predictions.bias, load_model(PRESET).cls.predictions.bias)


def test_dictionaries_with_other_hashes_and_hostile_ones_are_refused(hub, published, tmp_path):
    name = "geneformer/token_dictionary_gc104M.pkl"
    hub.put(REPOSITORY, {name: pickle.dumps({ensembl(1): Hostile(tmp_path / "pwned")})}, sha=PINNED)
    for opening in (lambda: GeneformerTokenizer.from_pretrained(PRESET), lambda: convert_checkpoint(PRESET, tmp_path / "out")):
        with pytest.raises((CheckpointError, UnsafePickleError), match=r"not the published dictionaries|refused"):
            opening()
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_without_dictionaries_it_says_to_convert(hub, published):
    hub.put("lab/bare", {name: (published / PRESET / name).read_bytes() for name in ("config.json", "model.safetensors")})
    with pytest.raises(CheckpointError, match="published checkpoints come without a tokenizer"):
        load_tokenizer("lab/bare")


def test_a_preset_that_cannot_be_reached(hub, offline):
    offline()
    for opening in (load_model, load_tokenizer):
        with pytest.raises(HubError, match=rf"{REPOSITORY}/{PRESET} \(revision f45a6c7\w+\) cannot be downloaded.*HF_HUB_OFFLINE"):
            opening(PRESET)


def test_nothing_that_is_not_known_by_its_hash_is_unpickled(hub, published, monkeypatch, tmp_path):
    """Where there are two token dictionaries, the size of the vocabulary decides; but a stranger is not even opened."""
    hub.put(REPOSITORY, {"geneformer/token_dictionary_gc104M.pkl": pickle.dumps({"x": 1})}, sha=PINNED)
    opened = []
    real = dictionaries.read_dictionary
    monkeypatch.setattr(dictionaries, "read_dictionary", lambda path: opened.append(path.name) or real(path))
    with pytest.raises((CheckpointError, VocabularyMismatchError)):
        GeneformerTokenizer.from_pretrained(PRESET)
    assert "token_dictionary_gc104M.pkl" not in opened


def test_cards_claim_only_what_is_so(hub, published, tmp_path, monkeypatch, caplog):
    """Figures of a published checkpoint are those of its weights; other repositories have their own licence."""
    convert_checkpoint(PRESET, tmp_path / "tiny")
    assert "and public users of the checkpoint state fff5cba" in caplog.text
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "fff5cba" not in card
    assert "0.724" not in card
    assert "license: apache-2.0" in card
    files = {path.relative_to(published).as_posix(): path.read_bytes() for path in published.rglob("*") if path.is_file() and path.suffix != ".bin"}
    hub.put("lab/mirror", files | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    convert_checkpoint("lab/mirror", tmp_path / "mirror", subfolder=PRESET)
    card = (tmp_path / "mirror" / "README.md").read_text()
    assert "apache" not in card.lower()
    assert "A Geneformer checkpoint of [lab/mirror]" in card
