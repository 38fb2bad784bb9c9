"""Checkpoints, adapters and dictionaries whose settings name code, files or other models, and pickles that harm their reader."""

import json
import os
import pickle
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from geneformer_hf import GeneformerForMaskedLM, GeneformerForSequenceClassification, GeneformerTokenizer, add_adapter, embed_cells, load_model, load_peft_model
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError, SettingError, UnsafePickleError
from geneformer_hf.hub.folders import describe_folder
from geneformer_hf.models.adapters import save_adapter
from geneformer_hf.models.places import converted_from
from geneformer_hf.pickles import read_class_ids, read_dictionary, read_label_mappings, read_raw_values, sha256
from tests.conftest import tiny_config


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "canary_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nBertModel = AutoModel = None\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield tmp_path / "ran"
    assert "canary_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def adapter(model_folder, tmp_path) -> Path:
    """An adapter that our code saved, on a base that is a folder of this disk."""
    save_adapter(add_adapter(load_model(model_folder)), tmp_path / "adapter")
    return tmp_path / "adapter"


HOSTILE_ADAPTER_FIELDS = {
    "auto_mapping": {"base_model_class": "BertModel", "parent_library": "canary_module"},
    "megatron_core": "canary_module",
    "megatron_config": {"init_method": "canary_module"},
    "loftq_config": {"loftq_bits": 4},
    "init_lora_weights": "loftq",
    "eva_config": {"rho": 2.0},
    "corda_config": {"cache_file": "/etc/passwd"},
    "lora_ga_config": {"a": "b"},
    "arrow_config": {"top_k": 2},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "tokenizer_name_or_path": "lab/tokenizer",
    "layers_pattern": "../../etc/passwd",
    "target_modules": ["query", {"a": "b"}],
    "exclude_modules": "(a+)+$" * 3,
    "revision": "../../main",
    "adapters": {"0": "lab/other"},
    "unheard_of": "canary_module",
}


@pytest.mark.parametrize("field", list(HOSTILE_ADAPTER_FIELDS))
def test_fields_of_an_adapter_that_name_code_or_files_are_refused(field, adapter, model_folder, canary, capsys, tmp_path):
    edit(adapter / "adapter_config.json", **{field: HOSTILE_ADAPTER_FIELDS[field]})
    for door in (load_model, load_peft_model, GeneformerForMaskedLM.from_pretrained, AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"adapter_config\.json: (the field ')?{field}"):
            door(adapter)
    assert main(["embed", str(tmp_path / "cells.h5ad"), "--model", str(adapter), "--output", str(tmp_path / "out.parquet")]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT"])
def test_adapters_that_go_around_the_head_are_refused_by_name(kind, adapter):
    edit(adapter / "adapter_config.json", peft_type=kind)
    with pytest.raises(CheckpointError, match=f"peft_type is '{kind}'.*pooling, label units and class weights would not be applied"):
        load_model(adapter)


def test_prefix_tuning_of_a_model_in_memory_is_refused(tokenizer):
    from peft import PrefixTuningConfig, get_peft_model

    adapted = get_peft_model(
        GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=1)), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    )
    with pytest.raises(SettingError, match=r"past_key_values was passed .* Use another adapter, such as LoRA"):
        adapted(input_ids=torch.tensor([[2, 5, 6, 3]]), attention_mask=torch.ones(1, 4, dtype=torch.long))


def test_an_adapter_opens_on_the_base_whose_hash_it_records(adapter, model_folder, caplog):
    assert isinstance(load_model(adapter), GeneformerForMaskedLM)
    # The base is named before it is opened.
    assert f"is an adapter of the model {model_folder}, which is opened with it" in caplog.text
    with torch.no_grad():
        other = load_model(model_folder)
        other.bert.encoder.layer[0].output.dense.bias += 1
    other.save_pretrained(model_folder)
    with pytest.raises(
        CheckpointError, match=r"names the base .*model, a folder of this disk, and records the hash .* so it may be another model\. Say which .* \(--base"
    ):
        load_model(adapter)
    assert isinstance(load_model(adapter, base=model_folder), GeneformerForMaskedLM)


@pytest.mark.parametrize("base", ["..", "../model", "{folder}", "{folder}/../model", "~/model", "/etc", "./."])
def test_a_base_that_is_a_folder_and_no_recorded_one_is_refused(base, adapter, model_folder, monkeypatch):
    monkeypatch.chdir(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=base.format(folder=model_folder))
    edit(adapter / "config.json", geneformer_base_sha256=None)
    with pytest.raises(CheckpointError, match=r"\(--base; folder or Hub id\)"):
        load_model(adapter)


@pytest.mark.parametrize("door", [AutoModelForMaskedLM, AutoModel, GeneformerForMaskedLM], ids=lambda c: c.__name__)
@pytest.mark.parametrize("base", ["{folder}", "../model", "lab/model"])
def test_the_auto_classes_open_no_folder_that_an_adapter_of_peft_names(base, door, adapter, model_folder, monkeypatch):
    """transformers puts the base in the place of an adapter without a config.json."""
    monkeypatch.chdir(adapter)
    (adapter / "lab").mkdir()
    (adapter / "lab" / "model").symlink_to(model_folder)
    edit(adapter / "adapter_config.json", base_model_name_or_path=base.format(folder=model_folder))
    (adapter / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a folder of this disk.*\(--base; folder or Hub id\)|is not there"):
        door.from_pretrained(adapter)


def test_a_pipe_in_a_base_that_an_adapter_names_is_not_waited_for(adapter, model_folder):
    os.mkfifo(model_folder / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"named pipe|so it may be another model"):
        load_model(adapter)
    edit(adapter / "config.json", geneformer_base_sha256=None)
    with pytest.raises(CheckpointError, match="records no hash of its weights"):
        load_model(adapter)


def test_an_adapter_beside_a_complete_model_is_ambiguous(adapter, model_folder):
    (adapter / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    for door in (load_model, GeneformerForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"holds a complete model .* and an adapter"):
            door(adapter)


HOSTILE_CONFIG_FIELDS = [
    ("attn_implementation", "kernels-community/flash-attn"),
    ("_attn_implementation", "lab/kernel:forward"),
    ("attn_implementation", "flash_attention_2"),
    ("attn_implementation", {"": "lab/kernel"}),
    ("auto_map", {"AutoModel": "lab/model--canary_module.Model"}),
    ("auto_map", {"AutoConfig": "canary_module.Config"}),
    ("transformers_weights", "../secret.safetensors"),
    ("use_kernels", True),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", {"quant_method": "canary_module"}),
    ("quantization_config", {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "canary_module"}),
    ("quantization_config", {"load_in_4bit": True, "llm_int8_skip_modules": ["../x"]}),
    ("quantization_config", {}),
    ("dtype", "canary_module.float"),
    ("torch_dtype", "load"),
    ("is_decoder", True),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE_CONFIG_FIELDS, ids=lambda v: str(v)[:40])
def test_fields_of_a_configuration_that_name_code_are_refused(field, value, model_folder, canary):
    edit(model_folder / "config.json", **{field: value})
    for door in (load_model, GeneformerForMaskedLM.from_pretrained, AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"config\.json.*: .*{field}"):
            door(model_folder)


def test_a_tokenizer_that_names_code_is_refused(model_folder, canary):
    edit(model_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["canary_module.Tokenizer", None]})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the field 'auto_map'"):
        GeneformerTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, "", "[1, 2]", "5"], ids=["deep", "empty", "list", "number"])
def test_files_of_a_tokenizer_that_are_no_object_are_refused(name, content, model_folder):
    (model_folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} (nests|cannot be read|holds a JSON)"):
        GeneformerTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize(
    "fields", [{"model_max_length": "x"}, {"model_max_length": -5}, {"pad_token": 5}, {"padding_side": "x"}, {"gene_table": {"a": 1}}, {"extra_special_tokens": 5}], ids=str
)  # fmt: skip
def test_settings_of_a_tokenizer_of_other_types_are_refused(fields, model_folder):
    edit(model_folder / "tokenizer_config.json", **fields)
    for door in (GeneformerTokenizer, AutoTokenizer):
        with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be opened"):
            door.from_pretrained(model_folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"label_columns": [["a"]]}, {"label_columns": 5}, {"label_columns": "cell_type"}, {"task_labels": ["a"]}, {"task_labels": {"a": "bc"}}, {"task_labels": {"a": [1]}},
        {"id2label": {"0": "a", "1": "b", "5": "c"}}, {"id2label": {"-1": "a", "0": "b"}}, {"id2label": ["a"]},
        {"id2label": {"0": "a\0b"}}, {"label_columns": ["\ud800"]},
    ],
    ids=str,
)  # fmt: skip
def test_names_of_classes_that_no_table_can_hold_are_refused(fields, model_folder):
    edit(model_folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=f"{next(iter(fields))} is .*; expected|holds a text with NUL"):
        load_model(model_folder)


@pytest.mark.parametrize(
    "pattern", ["((.+))+x", ".*" * 100 + "x", "(a|.|b)*" * 20 + "x", "(?:(?:.|.))*x", "((.|.))*x", "(.|.)" * 50 + "x", "(.|[a-z]){1,99}x", "(", "q" * 301]
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_expressions_that_take_forever_to_match_are_refused(field, pattern, adapter):
    edit(adapter / "adapter_config.json", **{field: {pattern: 3} if field == "rank_pattern" else pattern})
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"the field '{field}' is"):
        load_model(adapter)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "pattern",
    [
        r".*encoder\.layer\.(0|1|2)\..*(query|key|value|dense)",
        r"(base_model\.model\.)?bert\.encoder\.layer\.[0-9]+\..*(query|key|value|dense)",
        r".*layer\.\d{1,2}\..*(query|key|value|dense)$",
    ],
)
def test_expressions_that_people_write_are_legal(pattern, adapter):
    edit(adapter / "adapter_config.json", target_modules=pattern)
    assert isinstance(load_model(adapter), GeneformerForMaskedLM)


@pytest.mark.parametrize("fields", [{"r": 15_000_000}, {"rank_pattern": {"query": 10**9}}, {"r": -1}, {"r": "8"}], ids=str)
def test_ranks_beyond_any_base_are_refused(fields, adapter):
    edit(adapter / "adapter_config.json", **fields)
    with pytest.raises(CheckpointError, match="expected a whole number from 0 to 8,192"):
        load_model(adapter)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "a\0b", 3, None])
def test_an_index_of_weights_that_leads_out_of_the_folder_is_refused(name, model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00001.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"bert.pooler.dense.weight": name}}))
    for door in (load_model, GeneformerForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"weight_map names the file .* expected plain names of files in the same folder|holds a text with NUL"):
            door(model_folder)


@pytest.mark.parametrize("damage", ["an_index_of_nothing", "an_empty_pickle", "an_empty_file"])
def test_weights_that_are_not_there_are_refused_by_the_command_line(damage, model_folder, h5ad, tmp_path, capsys):
    (model_folder / "model.safetensors").unlink()
    name, content = {
        "an_index_of_nothing": ("model.safetensors.index.json", b'{"metadata": {}, "weight_map": {}}'),
        "an_empty_pickle": ("pytorch_model.bin", b""),
        "an_empty_file": ("model.safetensors", b""),
    }[damage]
    (model_folder / name).write_bytes(content)
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 1
    assert "cannot be opened as a Geneformer checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, "[1, 2]", '"text"', "{", "\xff"], ids=["deep", "list", "text", "broken", "not_utf8"])
def test_settings_that_are_no_object_are_refused(name, content, adapter, model_folder):
    folder = adapter if name.startswith("adapter") else model_folder
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{name} (nests|holds a JSON|cannot be read|is not text)"):
        load_model(folder)


def test_a_pipe_in_the_place_of_settings_is_refused_at_once(model_folder):
    (model_folder / "config.json").unlink()
    os.mkfifo(model_folder / "config.json")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="named pipe"):
        load_model(model_folder)
    assert time.monotonic() - start < 20


def nested(opening: bytes, closing: bytes, depth: int = 200_000) -> bytes:
    return b"\x80\x02" + opening * depth + closing * (depth - 1) + b"."


def exponential(levels: int = 60) -> bytes:
    """A pair of pairs of pairs …, each used twice: hashing or comparing it never ends."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels)) + b"."


HOSTILE_PICKLES = {
    "a_deep_list": nested(b"]", b"a"),
    "a_deep_dictionary": b"\x80\x02" + b"}K\x00" * 200_000 + b"}" + b"s" * 200_000 + b".",
    "deep_tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a_list_in_itself": b"\x80\x02]q\x00h\x00a.",
    "a_list_filled_later": b"\x80\x02]q\x00]q\x01h\x00ah\x00h\x01a.",
    "pairs_of_pairs": exponential(),
    "a_key_of_pairs_of_pairs": b"\x80\x02}" + exponential()[2:-1] + b"K\x01s.",
    "a_memo_larger_than_memory": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "a_persistent_object": b"\x80\x02K\x01Q.",
    "an_extension": b"\x80\x02\x82\x01.",
    "a_call_of_the_system": b"cposix\nsystem\n(S'touch ran'\ntR.",
    "cut_off": pickle.dumps({"a": 1})[:-3],
    "keys_of_one_hash": pickle.dumps({i * (2**61 - 1): 0 for i in range(1000)}),
    "lists_of_bytes": b"\x80\x04B"
    + struct.pack("<I", 1_000_000)
    + b"a" * 1_000_000
    + b"\x940cbuiltins\nlist\n\x940}("
    + b"".join(b"J" + struct.pack("<i", i) + b"h\x01h\x00\x85R" for i in range(60))
    + b"u.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", list(HOSTILE_PICKLES))
@pytest.mark.parametrize("reader", [read_dictionary, read_class_ids, read_label_mappings, read_raw_values], ids=lambda f: f.__name__)
def test_pickles_that_harm_their_reader_are_refused_before_they_are_built(name, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pkl").write_bytes(HOSTILE_PICKLES[name])
    start = time.monotonic()
    with pytest.raises((CheckpointError, UnsafePickleError), match=r"x\.pkl"):
        reader(Path("x.pkl"))
    assert time.monotonic() - start < 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pkl"]


@pytest.mark.parametrize("protocol", range(3, 6))
def test_pickles_as_published_are_read(protocol, tmp_path):
    shared = ["a", "b"]
    many = {f"G{i}": np.float64(i) for i in range(3000)} | {"list": shared, "again": shared, "big": list(range(5000))}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(many, protocol))
    assert read_dictionary(tmp_path / "x.pkl") == many


def test_embedding_with_a_hostile_checkpoint_opens_no_cells(model_folder, h5ad):
    edit(model_folder / "config.json", attn_implementation="lab/kernel")
    with pytest.raises(CheckpointError, match="may be downloaded as code"):
        embed_cells(model_folder, h5ad)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "more.safetensors"])
def test_pipes_in_the_place_of_weights_are_refused_at_once(name, model_folder):
    (model_folder / "model.safetensors").unlink()
    os.mkfifo(model_folder / name)
    start = time.monotonic()
    for door in (load_model, GeneformerForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"named pipe"):
            door(model_folder)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("hidden_size", -1), ("vocab_size", "64"), ("num_attention_heads", [2]), ("max_position_embeddings", 1e300)],
)
def test_sizes_of_no_model_are_refused_before_it_is_built(field, value, model_folder):
    edit(model_folder / "config.json", **{field: value})
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"{field} is .*; expected a whole number from 1 to"):
        load_model(model_folder)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"a": "\\ud800"}'])
def test_a_damaged_index_of_weights_is_not_pushed(content, model_folder):
    (model_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (cannot be read|holds a|names no files)"):
        describe_folder(model_folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": ["a"]}', '{"name": "lab/model", "revision": 7}', "{}"])
def test_a_damaged_record_of_a_conversion_is_refused(content, model_folder):
    record = json.loads(content) if content.startswith("{}") or ":" in content else None
    if record is not None:
        content = json.dumps(record | {"weights_sha256": sha256(model_folder / "model.safetensors")})
    (model_folder / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"conversion\.json (cannot be read|holds a JSON list|names no place)"):
        converted_from(model_folder)
