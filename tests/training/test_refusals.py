"""What `geneformer-hf pretrain` refuses: one clear message, exit code 1, no traceback, nothing left behind."""

import json
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

import geneformer_hf as gf
from geneformer_hf.cli.main import main
from geneformer_hf.errors import SettingError
from geneformer_hf.training.processes import require_processes
from tests.conftest import make_cells
from tests.training.conftest import NO_DROPOUT, make_tokens


@pytest.fixture
def folder(tmp_path, tokens, tokenizer):
    tokens.save_to_disk(tmp_path / "tokens")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def command(folder, **more):
    settings = {
        "output_dir": folder / "run", "tokenizer": folder / "tokenizer", "train_data": folder / "tokens", "shape": "gf-6L-30M-i2048", "shape_overrides": json.dumps(NO_DROPOUT),
        "max_steps": 2, "disable_tqdm": True, "held_out": 5,
    } | more  # fmt: skip
    return ["pretrain", *(word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value)))]


def check_refused(folder, capsys, pattern, **more):
    before = {path for path in folder.rglob("*") if not path.is_relative_to(folder / "run")}
    assert main(command(folder, **more)) == 1
    message = capsys.readouterr().err
    assert re.search(pattern, message), message
    assert "Traceback" not in message
    assert not (folder / "run" / "model").exists()
    assert {path for path in folder.rglob("*") if not path.is_relative_to(folder / "run")} == before


def test_it_works_at_all(folder, capsys):
    assert main(command(folder)) == 0
    printed = capsys.readouterr().out
    assert "5 held-out cells" in printed
    assert "gene frequency by rank" in printed
    assert main(command(folder)) == 1
    assert "holds the model of a finished run" in capsys.readouterr().err
    assert main([*command(folder), "--overwrite"]) == 0
    assert main(["pretrain", "--config", str(folder / "run" / "settings.yaml"), "--output_dir", str(folder / "again")]) == 0
    assert (folder / "again" / "model" / "model.safetensors").read_bytes() == (folder / "run" / "model" / "model.safetensors").read_bytes()


def test_a_dataset_of_another_vocabulary(folder, capsys, genes, v1_tokenizer, tmp_path):
    gf.load_cells(make_cells(genes), tokenizer=v1_tokenizer, cache_dir=folder / "cache").save_to_disk(folder / "other")
    check_refused(folder, capsys, r"other was tokenized with gene table \w+, and the tokenizer has \w+", train_data=folder / "other")


@pytest.mark.parametrize(
    ("cells", "pattern"),
    [
        pytest.param([[5, 6, 7]] * 9, r"bad: 9 of 9 cells looked at lack <cls> \(id 2\).*A V1 dataset does not fit a V2 model", id="v1_data_for_v2"),
        pytest.param([[2, 5, 3], [2, 64, 3]], r"bad holds the token id 64, and the vocabulary has 64 tokens", id="id_out_of_range"),
        pytest.param([[2, 5, 3], [2, -1, 3]], r"bad holds the token id -1", id="negative_id"),
        pytest.param(
            [[2, *range(4, 64), 4, 5, 6, 3]] * 3, r"bad holds cells of 65 tokens, and the model has positions for 64", id="longer_than_the_position_table"
        ),
        pytest.param([[2, 5, 3], []] * 5, r"bad: 5 of 10 cells looked at lack <cls>", id="empty_cells"),
    ],
)
def test_datasets_that_do_not_fit(folder, capsys, cells, pattern):
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(folder / "bad")
    check_refused(folder, capsys, pattern, train_data=folder / "bad")


def test_a_bad_id_among_many_cells_is_found_while_reading(folder, capsys):
    good = make_tokens(3000)["input_ids"][:]
    assert 1502 not in np.linspace(0, 2999, 1000).astype(int), "not one of those looked at before"
    good[1502][1] = 70
    datasets.Dataset.from_dict({"input_ids": good}).save_to_disk(folder / "bad")
    for workers in (0, 2):
        check_refused(folder, capsys, r"pretrain: row 1,502 of corpus 0 holds the token id 70, and the vocabulary has 64 tokens", train_data=folder / "bad", max_steps=375,
                dataloader_num_workers=workers, output_dir=folder / "run" / str(workers))  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        pytest.param(lambda f: next(f.glob("*.arrow")).write_bytes(b""), "the shard .* is empty", id="empty_shard"),
        pytest.param(lambda f: next(f.glob("*.arrow")).unlink(), "the shard .* is missing", id="missing_shard"),
        pytest.param(
            lambda f: next(f.glob("*.arrow")).write_bytes(b"no arrow at all" * 100), "cannot be read: .*It is damaged or incomplete", id="corrupt_shard"
        ),
        pytest.param(lambda f: (f / "state.json").write_text("{"), "cannot be read", id="corrupt_state"),
        pytest.param(shutil.rmtree, "does not exist; expected the folder of a tokenized dataset", id="gone"),
        pytest.param(lambda f: (f / "state.json").unlink(), "is not the folder of a tokenized dataset", id="not_a_dataset"),
    ],
)
def test_damaged_datasets(folder, capsys, damage, pattern):
    shutil.copytree(folder / "tokens", folder / "damaged")
    damage(folder / "damaged")
    check_refused(folder, capsys, pattern, train_data=folder / "damaged")


def test_a_folder_of_several_datasets(folder, capsys, tokens):
    datasets.DatasetDict({"train": tokens, "test": tokens}).save_to_disk(str(folder / "both"))
    check_refused(folder, capsys, r"both holds several datasets \(train, test\). Name one: .*train", train_data=folder / "both")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"train_data": None}, "No data: give `train_data`"),
        ({"tokenizer": None}, "No tokenizer: give `tokenizer`"),
        ({"shape": None, "shape_overrides": None}, "No model: give `shape` for a new one, or `from_checkpoint`"),
        ({"shape_overrides": '{"hiden_size": 3}'}, r"shape_overrides: hiden_size \(did you mean 'hidden_size'\?\) is no field of the configuration"),
        ({"shape_overrides": '{"hidden_size": 15, "num_attention_heads": 2}'}, "shape_overrides .* cannot be used"),
        ({"shape_overrides": '{"max_position_embeddings": 8}'}, "the tokenizer keeps 64 tokens a cell and the model has 8 positions"),
        ({"freeze_layers": 9}, "freeze_layers is 9, and the model has 2 layers"),
        ({"held_out": 100}, "100 of 100 cells cannot be held out"),
        ({"num_processes": 4}, r"num_processes is 4, and 1 are running. Start them with `torchrun --nproc_per_node 4"),
        ({"max_tokens_per_batch": 20}, "max_tokens_per_batch is 20, and the longest cell has"),
        ({"train_names": "a b"}, r"train_names \['a', 'b'\] for 1 datasets|expected one name"),
        ({"train_weights": "0"}, "expected one number above 0"),
        ({"from_checkpoint": "nowhere", "shape": None, "shape_overrides": None}, "nowhere does not exist"),
        ({"fsdp": "full_shard"}, "fsdp divides a model among processes, and there is one"),
    ],
)
def test_settings_that_do_not_fit_the_data(folder, capsys, change, pattern):
    if change.get("train_names"):
        words = command(folder)
        assert main([*words, "--train_names", *change["train_names"].split()]) == 1
        assert re.search(pattern, capsys.readouterr().err)
        return
    check_refused(folder, capsys, pattern, **change)


def test_processes_that_do_not_know_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match=r"2 processes were started \(WORLD_SIZE\), and this one works alone"):
        require_processes(SimpleNamespace(world_size=1, num_processes=None, fsdp=None, n_gpu=0, command="pretrain"))


def test_several_gpus_in_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SettingError, match=r"8 GPUs are visible to one process. Use them with `torchrun --nproc_per_node 8 "):
        require_processes(SimpleNamespace(world_size=1, num_processes=None, fsdp=None, n_gpu=8, command="pretrain"))


def test_a_classifier_is_not_gone_on_from(folder, capsys, tokenizer):
    gf.GeneformerForSequenceClassification(gf.GeneformerConfig(vocab_size=64, **NO_DROPOUT)).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    check_refused(
        folder,
        capsys,
        "is a GeneformerForSequenceClassification; pretraining goes on from a masked-gene model",
        from_checkpoint=folder / "classifier",
        shape=None,
        shape_overrides=None,
    )


def test_the_output_may_not_hold_the_data(folder, capsys):
    check_refused(folder, capsys, "holds the input", output_dir=folder)


def test_interrupted_it_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("geneformer_hf.training.pretraining.pretrain", interrupt)
    assert main(command(folder)) == 130
    assert "interrupted; the same command begins anew, for there is no checkpoint yet (save_steps is 500)" in capsys.readouterr().err
    (folder / "run" / "checkpoint-7").mkdir(parents=True)
    (folder / "run" / "checkpoint-7" / "geneformer_run.json").write_text("{}")
    assert main(command(folder)) == 130
    assert "the same command goes on from " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"tokenizer": "tokeniser"}, r"tokeniser does not exist \(looked for in "),
        ({"from_checkpoint": "/nowhere/at/all", "shape": None, "shape_overrides": None, "tokenizer": None}, "/nowhere/at/all does not exist"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "Trainer refuses these settings"),
        ({"report_to": "no_such_tracker"}, "refuses these settings|cannot be used"),
        ({"metric_for_best_model": "tissue_loss"}, r"metric_for_best_model 'tissue_loss' is not one of loss, .*loss_at_mask"),
        ({"optim": "galore_adamw"}, "refuses these settings|cannot be used"),
        ({"shape_overrides": '{"hidden_act": "foo"}'}, "shape_overrides .* cannot be used"),
        ({"shape_overrides": '{"hidden_size": "16"}'}, "shape_overrides .* cannot be used"),
        ({"shape_overrides": "{hidden_sise: 16}"}, r"hidden_sise \(did you mean 'hidden_size'\?\) is no field"),
    ],
)
def test_what_libraries_refuse(folder, capsys, change, pattern):
    check_refused(folder, capsys, pattern, **change)


def test_a_file_in_place_of_the_output(folder, capsys):
    (folder / "file").write_text("mine")
    check_refused(folder, capsys, "file is a file; name a folder", output_dir=folder / "file")


def test_a_batch_that_does_not_fit_into_memory(folder, capsys, monkeypatch):
    def allocate(*_, **__):
        msg = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        raise RuntimeError(msg)

    monkeypatch.setattr("transformers.Trainer.training_step", allocate)
    check_refused(
        folder,
        capsys,
        r"Out of memory with a batch of 8 cells, \d+ tokens: .* Lower per_device_train_batch_size and raise gradient_accumulation_steps by as much",
    )
