"""The public contract: the calls that others rely on, made as they make them, on tiny models and cells.

A failure here means that a promised name, argument, column or meaning has changed. Only what the contract names is
imported, so that everything behind it may move.
"""

import configparser
import inspect
import json
import pickle
import re
import subprocess
from collections import Counter
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    TrainingArguments,
)

import geneformer_hf as gf
from geneformer_hf.cli.main import main
from tests.conftest import ensembl, make_cells, with_row, write
from tests.tolerances import NAIVE_TWIN, SAME_MODEL

PROJECT = Path(__file__).parents[1]
NAMES = (
    "CellDatasetBuilder",
    "GeneTable",
    "GeneformerConfig",
    "GeneformerFineTuningArguments",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "GeneformerPretrainingArguments",
    "GeneformerTokenizer",
    "InSilicoPerturber",
    "Perturbation",
    "convert_checkpoint",
    "embed_cells",
    "embed_genes",
    "export_checkpoint",
    "finetune",
    "load_cells",
    "perturbation_statistics",
    "predict",
    "pretrain",
    "rank_genes",
)
COMMANDS = (
    "demo",
    "info",
    "convert",
    "export",
    "qc",
    "tokenize",
    "embed",
    "medians",
    "pretrain",
    "finetune",
    "search",
    "predict",
    "task",
    "evaluate",
    "benchmark",
    "attention",
    "perturb",
    "stats",
    "push",
    "pull",
)
SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "hidden_act": "relu",
    "initializer_range": 0.3,
}
DECODER = "cls.predictions.decoder.weight"
PERTURBATION_TABLE = {
    "cell_id": pa.string(),
    "kind": pa.string(),
    "genes": pa.list_(pa.string()),
    "target": pa.string(),
    "readout": pa.string(),
    "value": pa.float32(),
    "n_genes": pa.int32(),
}
N_CELLS = 12


@pytest.fixture(scope="module")
def tokenizer(table):
    """Of 60 genes, tokens 4 to 63, with <cls> 2 and <eos> 3."""
    return gf.GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=128)


@pytest.fixture(scope="module")
def v1_tokenizer(genes):
    """Of the same genes, tokens 2 to 61, without <cls> and <eos>."""
    table = gf.GeneTable(genes, range(2, len(genes) + 2), np.linspace(0.5, 3, len(genes)))
    return gf.GeneformerTokenizer(gene_table=table, model_max_length=128)


def config_for(tokenizer, **more):
    ends = {"cls_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.eos_token_id}
    return gf.GeneformerConfig(vocab_size=len(tokenizer), **SHAPE, **ends, **more)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return gf.GeneformerForMaskedLM(config_for(tokenizer)).eval()


@pytest.fixture(scope="module")
def cells(genes):
    states = pd.Categorical(["a", "b"] * (N_CELLS // 2))
    return make_cells(genes, N_CELLS, cell_type=states)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer, cells):
    """A user's folder with a converted checkpoint in model/ and cells in cells.h5ad."""
    root = tmp_path_factory.mktemp("contract")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write(cells, root / "cells.h5ad")
    return root


def save_plain_bert(folder, vocabulary, **more):
    torch.manual_seed(1)
    bert = BertForMaskedLM(BertConfig(vocab_size=vocabulary, **(SHAPE | more))).eval()
    bert.save_pretrained(folder)
    return bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory, v1_tokenizer):
    """A plain BERT and its folder, as checkpoints are published: no tokenizer beside the weights."""
    root = tmp_path_factory.mktemp("published") / "bert"
    return save_plain_bert(root, len(v1_tokenizer)), root


def hidden_states(model, tokens, layer):
    """Return the hidden states of one cell by one pass of plain transformers, of shape `(l, e)`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[layer][0]


def plain_embedding(model, tokens, layer, pooling, specials=()):
    hidden_le = hidden_states(model, tokens, layer)
    if pooling == "cls":
        return hidden_le[0].numpy()
    return hidden_le[[token not in specials for token in tokens]].mean(0).numpy()


def plain_similarity(model, tokens, gone, layer, pooling):
    """Compare a cell between <cls> and <eos> with the same cell without one gene: <cls>, or each gene that stays."""
    kept = [place for place, token in enumerate(tokens) if token != gone]
    before_le = hidden_states(model, tokens, layer)[kept]
    after_le = hidden_states(model, [tokens[place] for place in kept], layer)
    similarity_l = torch.cosine_similarity(before_le, after_le, dim=-1)
    return float(similarity_l[0] if pooling == "cls" else similarity_l[1:-1].mean())


def typed(*words):
    """Run a command as it is typed, in this process."""
    assert main([str(word) for word in words]) == 0


def words_for(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# Names


@pytest.mark.parametrize("name", NAMES)
def test_the_package_offers(name):
    assert name in gf.__all__
    assert getattr(gf, name).__name__ == name


@pytest.mark.parametrize(
    ("name", "in_place", "by_name"),
    [
        ("load_cells", ["files"], {"tokenizer", "num_proc", "cache_dir"}),
        ("embed_cells", ["model", "cells"], {"tokenizer", "layer", "pooling"}),
    ],
)
def test_inputs_come_in_place_and_options_by_name(name, in_place, by_name):
    arguments = inspect.signature(getattr(gf, name)).parameters.values()
    assert [a.name for a in arguments if a.kind is a.POSITIONAL_OR_KEYWORD] == in_place
    assert by_name <= {a.name for a in arguments if a.kind is a.KEYWORD_ONLY}


def test_embed_cells_reads_the_second_to_last_layer_and_finds_the_tokenizer_itself():
    arguments = inspect.signature(gf.embed_cells).parameters
    assert (arguments["layer"].default, arguments["tokenizer"].default) == (-2, None)


# Configuration and models


def test_the_configuration_is_a_bert_configuration_of_its_own_type():
    assert issubclass(gf.GeneformerConfig, BertConfig)
    assert gf.GeneformerConfig.model_type == "geneformer"
    assert AutoConfig.for_model("geneformer").__class__ is gf.GeneformerConfig
    assert AutoConfig.for_model("bert").__class__ is BertConfig


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "positions", "vocabulary"),
    [
        ("Geneformer-V1-10M", 256, 6, 2048, 25_426),
        ("Geneformer-V2-104M", 768, 12, 4096, 20_275),
        ("Geneformer-V2-104M_CLcancer", 768, 12, 4096, 20_275),
        ("Geneformer-V2-316M", 1152, 18, 4096, 20_275),
    ],
)
def test_a_preset_has_the_published_shape(name, hidden, layers, positions, vocabulary):
    config = gf.GeneformerConfig.from_preset(name)
    assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
    assert (config.max_position_embeddings, config.vocab_size) == (positions, vocabulary)


TASKS = {"cell_type": ["B", "NK", "T"], "disease": ["no", "yes"]}
HEADS = {
    "GeneformerModel": (AutoModel, {}, "last_hidden_state", [(2, 5, 16)]),
    "GeneformerForMaskedLM": (AutoModelForMaskedLM, {}, "logits", [(2, 5, 64)]),
    "GeneformerForSequenceClassification": (AutoModelForSequenceClassification, {"num_labels": 4}, "logits", [(2, 4)]),
    "GeneformerForTokenClassification": (AutoModelForTokenClassification, {"num_labels": 4}, "logits", [(2, 5, 4)]),
    "GeneformerForMultiTaskClassification": (
        AutoModelForSequenceClassification,
        {"task_labels": TASKS},
        "logits",
        [(2, 3), (2, 2)],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_auto_classes_open_what_was_saved(name, tokenizer, tmp_path):
    auto, fields, output, shapes = HEADS[name]
    torch.manual_seed(0)
    made = getattr(gf, name)(config_for(tokenizer, **fields)).eval()
    made.save_pretrained(tmp_path)
    opened = auto.from_pretrained(tmp_path).eval()
    assert type(opened) is getattr(gf, name)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "geneformer"
    batch = {"input_ids": torch.tensor([[2, 9, 8, 7, 3], [2, 5, 3, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with torch.no_grad():
        before, after = (getattr(one(**batch), output) for one in (made, opened))
    # One tensor for each task where there are several.
    before, after = (found if isinstance(found, tuple) else (found,) for found in (before, after))
    assert [tuple(tensor.shape) for tensor in after] == shapes
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_plain_bert_folder_opens_as_a_geneformer(bert):
    plain, root = bert
    assert sorted(path.name for path in root.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((root / "config.json").read_text())["model_type"] == "bert"
    assert DECODER not in load_file(root / "model.safetensors")
    opened = gf.GeneformerForMaskedLM.from_pretrained(root).eval()
    assert type(opened) is gf.GeneformerForMaskedLM
    assert opened.config.model_type == "geneformer"
    weights, ours = plain.state_dict(), opened.state_dict()
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    ids = torch.tensor([[5, 9, 30, 2]])
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_checkpoint_in_a_subfolder_opens_directly(bert):
    plain, root = bert
    opened = gf.GeneformerForMaskedLM.from_pretrained(root.parent, subfolder=root.name)
    assert torch.equal(opened.state_dict()[DECODER], plain.state_dict()[DECODER])


def test_a_plain_bert_stays_a_bert_for_the_auto_classes(bert):
    assert type(AutoModelForMaskedLM.from_pretrained(bert[1])) is BertForMaskedLM


def test_tied_decoder_weights_are_not_written(folder):
    assert DECODER not in load_file(folder / "model" / "model.safetensors")
    opened = gf.GeneformerForMaskedLM.from_pretrained(folder / "model")
    assert opened.cls.predictions.decoder.weight is opened.bert.embeddings.word_embeddings.weight


# Genes, ranking, tokenizer


def test_a_gene_table_holds_ids_tokens_and_medians():
    table = gf.GeneTable(["ENSG00000000003", "ENSG00000000005"], [4, 5], [1.0, 2.5])
    assert list(table.ensembl_ids) == ["ENSG00000000003", "ENSG00000000005"]
    assert (list(table.token_ids), list(table.medians)) == ([4, 5], [1.0, 2.5])


def test_rank_genes_orders_by_median_scaled_counts():
    counts_ng = sp.csr_array([[4, 0, 9], [0, 0, 0], [1, 5, 1]])
    ranked = gf.rank_genes(counts_ng, np.array([7, 8, 9]), np.array([1.0, 1.0, 3.0]), np.array([13, 0, 7]))
    assert [cell.tolist() for cell in ranked] == [[7, 9], [], [8, 7, 9]]
    assert all(cell.dtype == np.int32 for cell in ranked)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param({}, [[4, 6], [6]], id="without_special_tokens"),
        pytest.param({"cls_token": "<cls>", "eos_token": "<eos>"}, [[2, 4, 6, 3], [2, 6, 3]], id="with_cls_and_eos"),
    ],
)
def test_encode_counts_ranks_cells_between_the_special_tokens(ends, expected):
    names = [ensembl(i) for i in (1, 2, 3)]
    tokenizer = gf.GeneformerTokenizer(gene_table=gf.GeneTable(names, [4, 5, 6], [1.0, 1.0, 3.0]), **ends)
    encoded = tokenizer.encode_counts(np.array([[4, 0, 9], [0, 0, 1]]), names, totals_n=np.array([13, 1]))
    assert [cell.tolist() for cell in encoded] == expected
    assert all(cell.dtype == np.int32 for cell in encoded)


def test_a_tokenizer_comes_back_from_its_folder(folder, tokenizer):
    for opener in (gf.GeneformerTokenizer, AutoTokenizer):
        opened = opener.from_pretrained(folder / "model")
        assert type(opened) is gf.GeneformerTokenizer
        assert isinstance(opened.gene_table, gf.GeneTable)
        assert opened.gene_table.ensembl_ids == tokenizer.gene_table.ensembl_ids
        assert np.array_equal(opened.gene_table.medians, tokenizer.gene_table.medians)
        assert opened.get_vocab() == tokenizer.get_vocab()
        assert opened.model_max_length == 128


# Datasets


def test_load_cells_gives_a_dataset_in_the_order_of_the_cells(folder, cells, tokenizer, tmp_path):
    dataset = gf.load_cells(folder / "cells.h5ad", tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert type(dataset) is datasets.Dataset
    assert dataset.column_names == ["input_ids", "length", "cell_id", "cell_type"]
    assert dataset["cell_id"][:] == cells.obs_names.tolist()
    encoded = tokenizer.encode_counts(cells.X, cells.var_names)
    assert dataset["input_ids"][:] == [cell.tolist() for cell in encoded]
    assert dataset["length"][:] == [len(cell) for cell in encoded]
    assert dataset.features["length"].dtype == "int32"
    assert dataset.features["cell_id"].dtype == "string"
    assert dataset.features["input_ids"].feature.dtype.startswith("int")
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_load_cells_takes_cells_in_memory(cells, tokenizer, folder):
    in_memory = gf.load_cells(cells, tokenizer=tokenizer)
    assert in_memory.to_dict() == gf.load_cells(folder / "cells.h5ad", tokenizer=tokenizer).to_dict()


def test_processes_and_several_files_keep_the_order_given(cells, tokenizer, tmp_path):
    files = [write(part, tmp_path / f"{name}.h5ad") for name, part in (("z", cells[:7]), ("a", cells[7:]))]
    dataset = gf.load_cells(files, tokenizer=tokenizer, num_proc=2, cache_dir=tmp_path / "cache")
    assert type(dataset) is datasets.Dataset
    assert dataset.to_dict() == gf.load_cells(cells, tokenizer=tokenizer).to_dict()


def test_the_builder_gives_the_rows_of_load_cells(folder, tokenizer, tmp_path):
    files = (str(folder / "cells.h5ad"),)
    builder = gf.CellDatasetBuilder(files=files, tokenizer=tokenizer, cache_dir=tmp_path)
    assert isinstance(builder, datasets.ArrowBasedBuilder)
    builder.download_and_prepare()
    expected = gf.load_cells(*files, tokenizer=tokenizer).to_list()
    assert builder.as_dataset("train").to_list() == expected
    assert list(builder.as_streaming_dataset("train")) == expected


# Conversion

DICTIONARIES = ("token_dictionary", "gene_median_dictionary", "gene_name_id_dict", "ensembl_mapping_dict")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A plain BERT checkpoint, and the folder of its own four dictionaries."""
    root = tmp_path_factory.mktemp("own")
    names = [ensembl(i) for i in range(1, 21)]
    specials = ("<pad>", "<mask>", "<cls>", "<eos>")
    contents = (
        {token: i for i, token in enumerate((*specials, *names))},
        {name: i / 7 for i, name in enumerate(names, start=1)},
        {f"SYM{i}": name for i, name in enumerate(names)},
        {"OLD": names[0]},
    )
    (root / "dictionaries").mkdir()
    for name, content in zip(DICTIONARIES, contents, strict=True):
        (root / "dictionaries" / f"{name}_own.pkl").write_bytes(pickle.dumps(content))
    save_plain_bert(root / "checkpoint", len(contents[0]))
    return root / "checkpoint", root / "dictionaries"


def require_same_weights(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def require_auto_folder(folder, source):
    """Check that a converted folder opens with the Auto classes, with the weights of its source."""
    require_same_weights(folder, source)
    assert type(AutoModelForMaskedLM.from_pretrained(folder)) is gf.GeneformerForMaskedLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is gf.GeneformerTokenizer
    return tokenizer


def require_plain_folder(folder, source):
    """Check that an exported folder is the plain BERT checkpoint it once was."""
    require_same_weights(folder, source)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert type(AutoModelForMaskedLM.from_pretrained(folder)) is BertForMaskedLM
    assert not list(folder.glob("*token*"))


def test_converted_and_exported_is_the_checkpoint_again(published, tmp_path):
    source, dictionaries = published
    gf.convert_checkpoint(source, tmp_path / "ours", dictionaries=dictionaries, allow_unknown_dictionaries=True)
    tokenizer = require_auto_folder(tmp_path / "ours", source)
    assert tokenizer.gene_table.medians.tolist() == [i / 7 for i in range(1, 21)]
    assert (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 3, 128)
    gf.export_checkpoint(tmp_path / "ours", tmp_path / "back")
    require_plain_folder(tmp_path / "back", source)


def test_the_command_converts_and_exports(published, tmp_path):
    source, dictionaries = published
    typed("convert", source, tmp_path / "ours", "--dictionaries", dictionaries, "--allow-unknown-dictionaries")
    require_auto_folder(tmp_path / "ours", source)
    typed("export", tmp_path / "ours", tmp_path / "back")
    require_plain_folder(tmp_path / "back", source)


@pytest.mark.shared
def test_published_dictionaries_convert_without_further_options(shared, tmp_path):
    save_plain_bert(tmp_path / "bert", 20_275)
    dictionaries = shared / "data" / "geneformer_dicts_v2"
    typed("convert", tmp_path / "bert", tmp_path / "ours", "--dictionaries", dictionaries)
    tokenizer = require_auto_folder(tmp_path / "ours", tmp_path / "bert")
    assert len(tokenizer.gene_table.ensembl_ids) == 20_271
    published = pickle.loads((dictionaries / "token_dictionary_gc104M.pkl").read_bytes())
    assert tokenizer.get_vocab() == published


# Embeddings


@pytest.fixture(scope="module")
def v1_dataset(cells, v1_tokenizer):
    """Tokenized cells with what is needed and nothing else: neither obs nor a record of how they were made."""
    rows = gf.load_cells(cells, tokenizer=v1_tokenizer).select_columns(["input_ids", "length", "cell_id"])
    return datasets.Dataset.from_dict(rows.to_dict())


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_plain_bert_embeds_a_dataset_without_a_tokenizer(activation, layer, v1_dataset, tmp_path):
    plain = save_plain_bert(tmp_path, 62, hidden_act=activation)
    opened = gf.GeneformerForMaskedLM.from_pretrained(tmp_path)
    found = gf.embed_cells(opened, v1_dataset, tokenizer=None, layer=layer, pooling="mean")
    assert (found.shape, found.dtype) == ((N_CELLS, 16), np.float32)
    expected = [plain_embedding(plain, cell, layer, "mean") for cell in v1_dataset["input_ids"]]
    np.testing.assert_allclose(found, expected, atol=NAIVE_TWIN)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_published_vocabulary_brings_its_special_tokens(pooling, tmp_path):
    plain = save_plain_bert(tmp_path, 20_275)
    rng = np.random.default_rng(0)
    tokens = [[2, *rng.integers(4, 20_275, length).tolist(), 3] for length in (1, 30, 126, 7)]
    ids = {"input_ids": tokens, "length": [len(cell) for cell in tokens], "cell_id": list("wxyz")}
    opened = gf.GeneformerForMaskedLM.from_pretrained(tmp_path)
    found = gf.embed_cells(opened, datasets.Dataset.from_dict(ids), layer=-2, pooling=pooling)
    expected = [plain_embedding(plain, cell, -2, pooling, specials=(2, 3)) for cell in tokens]
    np.testing.assert_allclose(found, expected, atol=NAIVE_TWIN)


def test_cells_are_embedded_alike_however_they_come(model, tokenizer, cells, folder, tmp_path):
    expected = gf.embed_cells(model, cells, tokenizer=tokenizer, layer=-2, pooling="cls")
    assert (expected.shape, expected.dtype) == ((N_CELLS, 16), np.float32)
    dataset = gf.load_cells(cells, tokenizer=tokenizer)
    dataset.save_to_disk(tmp_path / "tokens")
    opened = gf.GeneformerForMaskedLM.from_pretrained(folder / "model")
    for given in (folder / "model", str(folder / "model"), opened):
        for source in (cells, folder / "cells.h5ad", str(folder / "cells.h5ad"), dataset, tmp_path / "tokens"):
            found = gf.embed_cells(given, source)
            np.testing.assert_allclose(found, expected, atol=SAME_MODEL)


def test_rows_follow_the_cells_and_cells_without_genes_keep_theirs(model, tokenizer, cells):
    whole = gf.embed_cells(model, cells, tokenizer=tokenizer)
    order = np.random.default_rng(0).permutation(N_CELLS)
    np.testing.assert_allclose(gf.embed_cells(model, cells[order], tokenizer=tokenizer), whole[order], atol=SAME_MODEL)
    one_empty = cells.copy()
    one_empty.X = with_row(cells.X, 4, 0)
    found = gf.embed_cells(model, one_empty, tokenizer=tokenizer)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [4]
    np.testing.assert_allclose(np.delete(found, 4, axis=0), np.delete(whole, 4, axis=0), atol=SAME_MODEL)


def test_embed_genes_gives_the_mean_over_the_cells_of_each_gene(bert, cells, v1_tokenizer):
    plain, root = bert
    found = gf.embed_genes(gf.GeneformerForMaskedLM.from_pretrained(root), cells, tokenizer=v1_tokenizer, layer=-2)
    vectors = {}
    for tokens in v1_tokenizer.encode_counts(cells.X, cells.var_names):
        hidden_le = hidden_states(plain, tokens.tolist(), -2).numpy()
        for token, vector in zip(tokens.tolist(), hidden_le, strict=True):
            vectors.setdefault(token, []).append(vector)
    seen = sorted(vectors)
    assert list(found.ensembl_ids) == v1_tokenizer.convert_ids_to_tokens(seen)
    assert found.vectors.dtype == np.float32
    assert found.n_cells.tolist() == [len(vectors[token]) for token in seen]
    np.testing.assert_allclose(found.vectors, [np.mean(vectors[token], axis=0) for token in seen], atol=NAIVE_TWIN)


# Perturbation


def require_perturbation_table(schema):
    """Check the first columns by name and type; others may follow."""
    assert schema.names[: len(PERTURBATION_TABLE)] == list(PERTURBATION_TABLE)
    assert {name: schema.field(name).type for name in PERTURBATION_TABLE} == PERTURBATION_TABLE


def require_same_perturbations(table, other):
    assert table.drop_columns("value").equals(other.drop_columns("value"))
    np.testing.assert_allclose(table["value"], other["value"], atol=SAME_MODEL)


READINGS = [
    pytest.param({}, "cls", -2, id="by_default"),
    pytest.param({"pooling": "mean", "layer": -1}, "mean", -1, id="as_asked"),
]


@pytest.mark.parametrize(("options", "pooling", "layer"), READINGS)
def test_deleting_every_gene_gives_one_cosine_per_cell_and_gene(options, pooling, layer, model, tokenizer, cells):
    perturber = gf.InSilicoPerturber(model, tokenizer=tokenizer, **options)
    dataset = gf.load_cells(cells[:4], tokenizer=tokenizer)
    table = perturber.run(dataset, gf.Perturbation.every("delete"))
    require_perturbation_table(table.schema)
    expected = {
        (cell["cell_id"], tokenizer.convert_ids_to_tokens(token)): (
            plain_similarity(model, cell["input_ids"], token, layer, pooling),
            cell["length"] - 3,
        )
        for cell in dataset
        for token in cell["input_ids"][1:-1]
    }
    found = {(row["cell_id"], *row["genes"]): (row["value"], row["n_genes"]) for row in table.to_pylist()}
    assert table.num_rows == len(found)
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], abs=NAIVE_TWIN) for key in expected)


def test_listed_genes_are_changed_one_by_one_or_together(model, tokenizer, cells, genes, tmp_path):
    perturber = gf.InSilicoPerturber(model, tokenizer=tokenizer)
    wanted = [*gf.Perturbation.each("delete", genes[:2]), gf.Perturbation(kind="delete", genes=tuple(genes[:2]))]
    table = perturber.run(cells, wanted)
    expressed = cells.X.toarray()[:, :2] > 0
    expected = Counter({tuple(genes[:1]): expressed[:, 0].sum(), tuple(genes[1:2]): expressed[:, 1].sum()})
    expected[tuple(genes[:2])] = expressed.all(axis=1).sum()
    assert Counter(map(tuple, table["genes"].to_pylist())) == expected
    written = pq.read_table(perturber.write(cells, wanted, tmp_path / "table.parquet"))
    require_perturbation_table(written.schema)
    require_same_perturbations(written, table)


# Training


@pytest.fixture
def usual(tmp_path):
    """What short runs have in common."""
    return {"output_dir": str(tmp_path / "run"), "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}


def test_pretraining_leaves_a_model_for_the_auto_classes(usual, cells, tokenizer):
    assert issubclass(gf.GeneformerPretrainingArguments, TrainingArguments)
    arguments = gf.GeneformerPretrainingArguments(
        shape="gf-6L-30M-i2048",
        shape_overrides=SHAPE,
        held_out=4,
        num_train_epochs=1,
        **usual,
    )
    run = gf.pretrain(arguments, gf.load_cells(cells, tokenizer=tokenizer), tokenizer=tokenizer)
    opened = AutoModelForMaskedLM.from_pretrained(run.folder)
    assert type(opened) is gf.GeneformerForMaskedLM
    assert (opened.config.hidden_size, opened.config.hidden_act) == (16, "relu")
    assert gf.embed_cells(run.folder, cells).shape == (N_CELLS, 16)


@pytest.fixture(scope="module")
def labelled(genes):
    return make_cells(genes, 60, cell_type=pd.Categorical(["B", "T"] * 30))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_what_was_fine_tuned_from_a_local_folder_predicts(adapter, usual, labelled, tokenizer, folder):
    if adapter == "lora":
        pytest.importorskip("peft")
    assert issubclass(gf.GeneformerFineTuningArguments, TrainingArguments)
    arguments = gf.GeneformerFineTuningArguments(
        from_checkpoint=str(folder / "model"),
        label=["cell_type"],
        adapter=adapter,
        baselines=False,
        num_train_epochs=1,
        **usual,
    )
    run = gf.finetune(arguments, labelled)
    assert (run.folder / "adapter_config.json").is_file() == (adapter == "lora")
    found = gf.predict(run.folder, labelled[::-1]).to_frame()
    assert found.index.tolist() == labelled.obs_names[::-1].tolist()
    assert set(found["cell_type_predicted"]) <= {"B", "T"}
    of_run = gf.predict(run.model, labelled[::-1], tokenizer=tokenizer).to_frame()
    np.testing.assert_allclose(found["cell_type_probability_B"], of_run["cell_type_probability_B"], atol=SAME_MODEL)
    assert gf.embed_cells(run.folder, labelled).shape == (60, 16)


def test_a_model_that_peft_wraps_predicts_and_embeds(folder, labelled, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    base = gf.GeneformerForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    settings = peft.LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value"],
        # New with the classifier: a masked-gene checkpoint has no pooler.
        modules_to_save=["pooler", "classifier"],
        init_lora_weights=False,
    )
    made = peft.get_peft_model(base, settings)
    made.save_pretrained(tmp_path)
    again = gf.GeneformerForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    opened = peft.PeftModel.from_pretrained(again, tmp_path)
    before, after = (gf.predict(one, labelled, tokenizer=tokenizer).to_frame() for one in (made, opened))
    pd.testing.assert_frame_equal(before, after, atol=SAME_MODEL)
    wrapped = gf.embed_cells(opened, labelled, tokenizer=tokenizer)
    plain = gf.embed_cells(folder / "model", labelled)
    assert wrapped.shape == plain.shape == (60, 16)
    assert np.abs(wrapped - plain).max() > 0.01


# The command line


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    listed = re.findall(r"^    ([a-z][a-z-]*)\b", capsys.readouterr().out, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as done:
        code = done.code
    assert code == 0
    assert f"usage: geneformer-hf {command}" in capsys.readouterr().out


def test_tokenize_joins_its_inputs_in_their_order(folder, cells, tokenizer, tmp_path):
    files = [write(part, tmp_path / f"{name}.h5ad") for name, part in (("z", cells[:7]), ("a", cells[7:]))]
    typed("tokenize", *files, "--model", folder / "model", "--output", tmp_path / "tokens")
    dataset = datasets.load_from_disk(str(tmp_path / "tokens"))
    assert dataset.to_dict() == gf.load_cells(cells, tokenizer=tokenizer).to_dict()


@pytest.mark.parametrize(("options", "pooling", "layer"), READINGS)
def test_embed_writes_what_embed_cells_returns(options, pooling, layer, folder, cells, tmp_path):
    expected = gf.embed_cells(folder / "model", cells, pooling=pooling, layer=layer)
    command = ("embed", folder / "cells.h5ad", "--model", folder / "model", *words_for(options), "--output")
    typed(*command, tmp_path / "out.h5ad")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs_names.equals(cells.obs_names)
    assert written.obsm["X_geneformer"].dtype == np.float32
    np.testing.assert_allclose(written.obsm["X_geneformer"], expected, atol=SAME_MODEL)
    typed(*command, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["cell_id"] == cells.obs_names.tolist()
    np.testing.assert_allclose(table["embedding"], expected, atol=SAME_MODEL)


@pytest.fixture(scope="module")
def perturb(folder):
    """Perturb the cells of the folder by the command, and return the file."""

    def run(name, kind, genes, *words):
        output = folder / name / "table.parquet"
        output.parent.mkdir()
        command = ("perturb", folder / "cells.h5ad", "--model", folder / "model", "--output", output)
        typed(*command, "--kind", kind, "--genes", genes, *words)
        return output

    return run


@pytest.mark.parametrize("kind", ["delete", "overexpress", "inhibit", "activate"])
def test_perturb_all_has_one_row_per_cell_and_gene(kind, perturb, cells, genes):
    path = perturb(f"all_{kind}", kind, "all")
    assert list(path.parent.iterdir()) == [path]
    table = pq.read_table(path)
    require_perturbation_table(table.schema)
    constant = {name: set(table[name].to_pylist()) for name in ("kind", "readout", "target")}
    assert constant == {"kind": {kind}, "readout": {"cell"}, "target": {""}}
    assert list(dict.fromkeys(table["cell_id"].to_pylist())) == cells.obs_names.tolist()
    rows = [(row["cell_id"], *row["genes"]) for row in table.to_pylist()]
    assert len(set(rows)) == len(rows)
    expressed = {(cells.obs_names[i], genes[j]) for i, j in zip(*cells.X.nonzero(), strict=True)}
    assert set(rows) <= expressed
    # Unless it is deleted, the gene that stands where the change would put it may be left out.
    missing = Counter(cell_id for cell_id, _ in expressed - set(rows))
    assert max(missing.values(), default=0) <= (0 if kind == "delete" else 1)


def test_perturb_takes_genes_by_id_or_symbol_and_names_them_by_id(perturb, cells, genes):
    table = pq.read_table(perturb("listed", "delete", f"{genes[3]},SYM7")).to_pydict()
    expressed = cells.X.toarray() > 0
    assert Counter(map(tuple, table["genes"])) == {(genes[i],): expressed[:, i].sum() for i in (3, 7)}


@pytest.mark.parametrize(("options", "pooling", "layer"), READINGS)
def test_perturb_writes_what_the_perturber_returns(options, pooling, layer, perturb, folder, cells):
    table = pq.read_table(perturb(f"reading_{pooling}", "delete", "all", *words_for(options)))
    perturber = gf.InSilicoPerturber(folder / "model", pooling=pooling, layer=layer)
    expected = perturber.run(cells, gf.Perturbation.every("delete"))
    require_same_perturbations(table, expected)


STATES = ("--state-column", "cell_type", "--start", "a", "--goal", "b")
STATISTICS = {
    "goal_state_shift": (("all", *STATES), (), {"Gene", "Ensembl_ID", "Shift_to_goal_end", "Goal_end_FDR", "Sig"}),
    "vs_null": (("all",), ("--null", "null.parquet"), {"Gene", "Ensembl_ID", "Test_vs_null_avg_shift", "Sig"}),
    "mixture_model": (("all",), (), {"Gene", "Ensembl_ID", "Test_avg_shift", "Impact_component"}),
    "aggregate_data": ((ensembl(1),), (), {"Cosine_sim", "Gene"}),
    "aggregate_gene_shifts": ((ensembl(1), "--readout", "gene"), (), {"Perturbed", "Affected", "Cosine_sim_mean"}),
    "effects": (("all",), (), {"Ensembl_ID", "effect", "n_cells", "p_paired"}),
    "cooperativity": ((f"{ensembl(1)},{ensembl(2)}", "--pairs"), (), {"Ensembl_ID_1", "Ensembl_ID_2", "excess"}),
}


@pytest.mark.parametrize("mode", STATISTICS)
def test_stats_writes_a_table_for_every_mode(mode, perturb, tmp_path, monkeypatch):
    genes, words, columns = STATISTICS[mode]
    if mode == "vs_null":
        perturb("null", "overexpress", "all").rename(tmp_path / "null.parquet")
    monkeypatch.chdir(tmp_path)
    typed("stats", perturb(f"stats_{mode}", "delete", *genes), "--mode", mode, *words, "--output", "out.csv")
    found = pd.read_csv("out.csv")
    assert len(found)
    assert columns <= set(found.columns)


@pytest.mark.parametrize("mode", ["mixture_model", "goal_state_shift"])
def test_perturbation_statistics_takes_a_table_and_a_mode(mode, tokenizer, perturb):
    path = perturb(f"function_{mode}", "delete", *STATISTICS[mode][0])
    for table in (path, pq.read_table(path)):
        found = gf.perturbation_statistics(table, mode, gene_table=tokenizer.gene_table)
        assert isinstance(found, pd.DataFrame)
        assert STATISTICS[mode][2] <= set(found.columns)
        assert set(found["Gene"]) <= set(range(4, 64))


# The project


def requirements_in(text):
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_constraints_pin_what_the_extra_all_asks_for():
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(PROJECT / "setup.cfg", encoding="utf-8")
    pins = requirements_in((PROJECT / "constraints.txt").read_text())
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for section, name in (("options", "install_requires"), ("options.extras_require", "all")):
        wanted = requirements_in(setup_cfg[section][name])
        assert wanted
        refused = [str(one) for one in wanted if not one.specifier.contains(versions[canonicalize_name(one.name)])]
        assert refused == []


@pytest.mark.parametrize(("target", "command"), [("run", "geneformer-hf demo"), ("test", "-m pytest")])
def test_make_knows_the_target(target, command):
    done = subprocess.run(["make", "--dry-run", target], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert command in done.stdout
