import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

from geneformer_hf import (
    CHECKPOINTS,
    GeneformerConfig,
    GeneformerForMaskedLM,
    GeneformerForSequenceClassification,
    GeneformerTokenizer,
    convert_checkpoint,
    export_checkpoint,
    export_onnx,
)
from geneformer_hf.errors import CheckpointError, OutputError, OutputExistsError, UnsafePickleError, VocabularyMismatchError
from geneformer_hf.models import checkpoints, dictionaries
from geneformer_hf.models.configuration_geneformer import PRESETS
from geneformer_hf.models.loading import load_model, load_tokenizer, tokenizer_of
from geneformer_hf.outputs import MARK
from tests.conftest import ensembl, tiny_config

N = 20
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "hidden_act": "relu"}


def write_dictionaries(folder, tail="_gc104M", specials=("<pad>", "<mask>", "<cls>", "<eos>"), n=N):
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: i for i, token in enumerate(specials)} | {ensembl(i): np.int16(i + len(specials) - 1) for i in range(1, n + 1)}
    contents = {
        "token_dictionary": tokens,
        "gene_median_dictionary": {ensembl(i): np.float64(i / 7) for i in range(1, n + 30)},
        "gene_name_id_dict": {f"SYM{i}": ensembl(i) for i in range(1, n - 3)},
        "ensembl_mapping_dict": {ensembl(900): ensembl(2), "OLD": ensembl(3), ensembl(4): ensembl(4), "GONE": ensembl(901)},
    }
    for name, content in contents.items():
        (folder / f"{name}{tail}.pkl").write_bytes(pickle.dumps(content))
    return len(tokens)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone in the published layout, whose dictionaries pass for published ones."""
    root = tmp_path / "clone"
    vocabulary = write_dictionaries(root / "geneformer")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=vocabulary, **SHAPE)).save_pretrained(root / "Geneformer-tiny")
    found = dictionaries.find_dictionaries(root, vocabulary)
    monkeypatch.setitem(checkpoints.DICTIONARY_HASHES, "V2", {kind: dictionaries.sha256(path) for kind, path in found.items()})
    return root


def test_a_published_layout_becomes_an_auto_folder(clone, tmp_path):
    done = convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    assert (done.version, done.n_genes, done.architecture) == ("V2", N, "GeneformerForMaskedLM")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        MARK,
        "README.md",
        "config.json",
        "gene_table.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    source = load_file(clone / "Geneformer-tiny" / "model.safetensors")
    assert done.n_tensors == len(source)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.items())
    table = tokenizer.gene_table
    assert (tokenizer.cls_token_id, tokenizer.eos_token_id, model.config.cls_token_id, model.config.eos_token_id) == (2, 3, 2, 3)
    assert model.config.vocabulary_fingerprint == table.fingerprint
    assert tokenizer.model_max_length == 64
    assert table.medians.tolist() == [i / 7 for i in range(1, N + 1)]
    assert (table.symbols[0], table.symbols[-1]) == ("SYM1", "")
    assert table.aliases == {ensembl(900): ensembl(2), "OLD": ensembl(3)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a local folder (Geneformer-tiny)" in card
    assert str(tmp_path) not in card
    with pytest.raises(OutputExistsError, match="exists"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")


def test_a_folder_of_one_checkpoint_finds_the_dictionaries_of_its_clone(clone, tmp_path):
    assert convert_checkpoint(clone / "Geneformer-tiny", tmp_path / "out").version == "V2"


def test_dictionaries_in_a_folder_of_their_own(clone, tmp_path):
    shutil.move(clone / "geneformer", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"No token_dictionary\*\.pkl below"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    assert convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny", dictionaries=tmp_path / "elsewhere").version == "V2"


def test_of_two_generations_the_fitting_one_is_taken(clone, tmp_path):
    write_dictionaries(clone / "geneformer" / "gene_dictionaries_30m", "_gc30M", ("<pad>", "<mask>"), n=9)
    done = convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    assert done.n_genes == N


def test_a_legacy_checkpoint_with_position_ids_and_untied_copies(clone, tmp_path):
    folder = clone / "Geneformer-tiny"
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    done = convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    assert done.n_tensors == len(tensors) - 1


def test_a_published_classifier_keeps_its_head(clone, tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=N + 4, num_labels=3, **SHAPE)).save_pretrained(clone / "classifier")
    assert convert_checkpoint(clone, tmp_path / "out", subfolder="classifier").architecture == "GeneformerForSequenceClassification"
    model = load_model(tmp_path / "out")
    assert type(model) is GeneformerForSequenceClassification
    assert model.config.pooling == "first"


def break_it(clone, how):
    folder, dictionaries = clone / "Geneformer-tiny", clone / "geneformer"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    if how == "weights_pointer":
        (folder / "model.safetensors").write_text(pointer)
    elif how == "dictionary_pointer":
        (dictionaries / "token_dictionary_gc104M.pkl").write_text(pointer)
    elif how == "wrong_hash":
        path = dictionaries / "gene_median_dictionary_gc104M.pkl"
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(content | {"x": 1.0}))
    elif how == "missing_dictionary":
        (dictionaries / "gene_name_id_dict_gc104M.pkl").unlink()
    elif how == "missing_tensor":
        tensors = load_file(folder / "model.safetensors")
        del tensors["bert.encoder.layer.1.output.dense.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif how == "vocabulary":
        BertForMaskedLM(BertConfig(vocab_size=99, **SHAPE)).save_pretrained(folder)
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForNextSentencePrediction"]}
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "cut_off":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("weights_pointer", CheckpointError, r"model\.safetensors is a git-lfs pointer"),
        ("dictionary_pointer", CheckpointError, r"token_dictionary_gc104M\.pkl is a git-lfs pointer"),
        ("wrong_hash", CheckpointError, r"gene_median_dictionary_gc104M\.pkl \(\w{12}…\) are not the published dictionaries"),
        ("missing_dictionary", CheckpointError, r"Dictionaries are incomplete; missing in .*gene_name_id_dict_gc104M\.pkl"),
        ("missing_tensor", CheckpointError, r"lacks 1 weights of its encoder: bert\.encoder\.layer\.1\.output\.dense\.weight"),
        ("vocabulary", VocabularyMismatchError, "has a vocabulary of 99 and the dictionaries .* one of 24"),
        ("architecture", CheckpointError, "names the architecture 'BertForNextSentencePrediction'"),
        ("cut_off", CheckpointError, "weights cannot be read"),
    ],
)
def test_a_broken_source_is_refused_and_leaves_nothing(how, error, words, clone, tmp_path):
    break_it(clone, how)
    with pytest.raises(error, match=words):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone"]


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_hostile_dictionary_executes_nothing_even_when_unknown_ones_are_allowed(clone, tmp_path):
    path = clone / "geneformer" / "token_dictionary_gc104M.pkl"
    path.write_bytes(pickle.dumps({ensembl(1): Hostile(tmp_path / "pwned")}))
    with pytest.raises(CheckpointError, match="not the published"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    with pytest.raises(UnsafePickleError, match="refused"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny", allow_unknown_dictionaries=True)
    assert not (tmp_path / "pwned").exists()


def test_own_dictionaries_need_the_flag(clone, tmp_path):
    break_it(clone, "wrong_hash")
    assert convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny", allow_unknown_dictionaries=True).version is None


def test_a_gene_without_a_median_is_named(clone, tmp_path):
    path = clone / "geneformer" / "gene_median_dictionary_gc104M.pkl"
    path.write_bytes(pickle.dumps({ensembl(i): 1.0 for i in range(2, 40)}))
    with pytest.raises(VocabularyMismatchError, match=rf"1 genes of the vocabulary have no median, for instance {ensembl(1)}"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny", allow_unknown_dictionaries=True)


def test_a_converted_folder_is_not_converted_again(clone, tmp_path):
    convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    with pytest.raises(CheckpointError, match="it is converted already"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again")


def test_dictionaries_of_strangers_are_not_looked_at(clone, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.move(clone / "Geneformer-tiny", tmp_path / "alone" / "model")
    with pytest.raises(CheckpointError, match=r"No token_dictionary"):
        convert_checkpoint(tmp_path / "alone" / "model", tmp_path / "out")


def test_an_incomplete_generation_is_named_even_beside_a_complete_one(clone, tmp_path):
    write_dictionaries(clone / "geneformer" / "gene_dictionaries_30m", "_gc30M", ("<pad>", "<mask>"), n=9)
    (clone / "geneformer" / "ensembl_mapping_dict_gc104M.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"for a vocabulary of 24; missing in .*ensembl_mapping_dict_gc104M\.pkl"):
        convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param("nothing-like-this", "does not exist .*or one of the published checkpoints", id="no_such_thing"),
        pytest.param("Geneformer-V1-10M", "cannot be downloaded", id="preset_offline"),
        pytest.param("someone/something", "cannot be downloaded", id="hub_id_offline"),
    ],
)
def test_a_source_that_is_not_there(source, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(source, tmp_path / "out")


def test_a_clone_without_subfolder_lists_its_checkpoints(clone, tmp_path):
    with pytest.raises(CheckpointError, match=r"--subfolder`\): Geneformer-tiny"):
        convert_checkpoint(clone, tmp_path / "out")


def test_the_export_is_the_published_checkpoint_again(clone, tmp_path):
    convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    export_checkpoint(tmp_path / "out", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForMaskedLM"])
    assert not {"pooling", "cls_token_id", "vocabulary_fingerprint", "task_labels"} & set(config)
    a, b = load_file(tmp_path / "bert" / "model.safetensors"), load_file(clone / "Geneformer-tiny" / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_without_counterpart_is_not_exported(tokenizer, tmp_path):
    GeneformerForSequenceClassification(tiny_config(tokenizer, pooling="mean")).save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="pooling 'mean' has no counterpart"):
        export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_published_folder_without_tokenizer_says_to_convert(clone, tmp_path):
    shutil.move(clone / "Geneformer-tiny", tmp_path / "alone" / "model")
    with pytest.raises(CheckpointError, match=r"published checkpoints come without a tokenizer\. Run `geneformer-hf convert"):
        load_tokenizer(tmp_path / "alone" / "model")


def test_a_clone_opens_without_conversion(clone, tmp_path):
    convert_checkpoint(clone, tmp_path / "out", subfolder="Geneformer-tiny")
    expected = GeneformerTokenizer.from_pretrained(tmp_path / "out")
    for found in (
        GeneformerTokenizer.from_pretrained(clone, subfolder="Geneformer-tiny"),
        GeneformerTokenizer.from_pretrained(clone / "Geneformer-tiny"),
        tokenizer_of(GeneformerForMaskedLM.from_pretrained(clone, subfolder="Geneformer-tiny")),
    ):
        assert found.gene_table.fingerprint == expected.gene_table.fingerprint
        assert (found.get_vocab(), found.model_max_length, found.cls_token_id) == (expected.get_vocab(), 64, 2)


def test_a_clone_with_other_dictionaries_is_not_opened(clone):
    break_it(clone, "wrong_hash")
    with pytest.raises(CheckpointError, match="are not the published dictionaries"):
        GeneformerTokenizer.from_pretrained(clone, subfolder="Geneformer-tiny")


@pytest.mark.parametrize(("folder", "words"), [("gone/away/far", "does not exist"), (".", "holds no config.json")])
def test_what_is_no_checkpoint(folder, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / folder)


def test_every_preset_has_a_checkpoint_and_a_shape():
    assert set(CHECKPOINTS) == set(PRESETS)
    for name, checkpoint in CHECKPOINTS.items():
        assert checkpoint.version == ("V2" if GeneformerConfig.from_preset(name).vocab_size == 20_275 else "V1")


def test_nothing_replaces_its_own_source(clone, tmp_path):
    for output in (clone, clone / "Geneformer-tiny"):
        with pytest.raises(OutputError, match="which writing there would replace"):
            convert_checkpoint(clone, output, subfolder="Geneformer-tiny", overwrite=True)
    convert_checkpoint(clone, tmp_path / "out" / "model", subfolder="Geneformer-tiny")
    for export in (export_checkpoint, export_onnx):
        for output in (tmp_path / "out", tmp_path / "out" / "model"):
            with pytest.raises(OutputError, match="which writing there would replace"):
                export(tmp_path / "out" / "model", output, overwrite=True)
    assert (tmp_path / "out" / "model" / "gene_table.json").is_file()


WRONG_VALUES = {"tokens": (-1, 10**12, 1.5, float("nan"), "x", None, True, [1]), "medians": (-1, 0, float("nan"), float("inf"), "x", None, True),
                "symbols": (5, None, [1]), "aliases": (5, None, {})}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_values_of_another_type_in_published_dictionaries_are_named(kind, tmp_path):
    size = write_dictionaries(tmp_path)
    found = dictionaries.find_dictionaries(tmp_path, size, allow_unknown=True)
    whole = pickle.loads(found[kind].read_bytes())
    name = next(key for key in whole if not key.startswith("<"))
    for value in WRONG_VALUES[kind]:
        found[kind].write_bytes(pickle.dumps(whole | {name: value}))
        with pytest.raises(CheckpointError, match=rf"{found[kind].name}: '{name}' has the value .*; expected (whole numbers|numbers above 0|Ensembl ids)"):
            dictionaries.table_of(found)
    found[kind].write_bytes(pickle.dumps(whole | {name: np.float64(2.5)} if kind == "medians" else whole))
    assert len(dictionaries.table_of(found)[0])
