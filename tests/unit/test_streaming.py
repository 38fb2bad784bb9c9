"""Streams: every cell once an epoch, whoever reads, and the rest of them after any interruption."""

import json
from itertools import chain

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Trainer, TrainingArguments

from geneformer_hf import GeneformerForMaskedLM, load_cells, stream_cells, stream_tokens, tokenize_corpus
from geneformer_hf.data.collators import DataCollatorForMaskedGenes
from geneformer_hf.errors import CellFileError, SettingError
from tests.conftest import make_cells, tiny_config, with_row, write
from tests.formats import files as formats

N, LEFT = 211, 208


@pytest.fixture(scope="module")
def folder(tmp_path_factory, genes, tokenizer):
    """The same cells as counts, as a dataset folder and as Parquet, 211 of them with 3 left out."""
    folder = tmp_path_factory.mktemp("streams")
    first = make_cells(genes, 120, seed=1)
    first.obs["filter_pass"] = np.arange(120) != 7
    first.X = with_row(with_row(first.X, 50, 0), 51, 0)
    second = make_cells(genes, N - 120, seed=2)
    second.obs["filter_pass"] = True
    second.obs_names = [f"other{i}" for i in range(N - 120)]
    (folder / "counts").mkdir()
    write(first, folder / "counts" / "a.h5ad", "csc")
    write(second, folder / "counts" / "b.h5ad")
    dataset = tokenize_corpus(folder / "counts", folder / "tokens", tokenizer=tokenizer)
    (folder / "parquet").mkdir()
    for i in range(3):
        pq.write_table(dataset.select(range(i * 70, min(LEFT, (i + 1) * 70))).with_format("arrow")[:], folder / "parquet" / f"{i}.parquet", row_group_size=16)
    return folder


@pytest.fixture(params=["counts", "arrow", "parquet"])
def make(request, folder, tokenizer):
    def stream(**options):
        if request.param == "counts":
            return stream_cells(folder / "counts", tokenizer=tokenizer, shard_cells=16, **options)
        return stream_tokens(folder / ("tokens" if request.param == "arrow" else "parquet"), shard_cells=16, **options)

    return stream


@pytest.fixture(scope="module")
def ids(folder):
    return datasets.load_from_disk(str(folder / "tokens"))["cell_id"][:]


def read(stream) -> list[str]:
    return [row["cell_id"] for row in stream]


def test_in_order_a_stream_is_the_dataset(make, folder):
    dataset = datasets.load_from_disk(str(folder / "tokens"))
    rows = list(make())
    assert [row["cell_id"] for row in rows] == dataset["cell_id"][:]
    assert [row["input_ids"].tolist() for row in rows] == dataset["input_ids"][:]
    assert [row["length"] for row in rows] == dataset["length"][:]


def test_obs_and_counts_on_request(folder, tokenizer):
    expected = load_cells(folder / "counts", tokenizer=tokenizer, keep_counts=True, cache_dir=folder / "cache")
    stream = stream_cells(folder / "counts", tokenizer=tokenizer, obs="all", keep_counts=True, shard_cells=50)
    assert stream.features == expected.features
    assert [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in stream] == list(expected)
    assert stream_tokens(folder / "tokens", columns=["input_ids"]).column_names == ["input_ids"]


def test_cells_in_memory_and_other_kinds_of_files_stream_too(tmp_path, cells, tokenizer):
    expected = load_cells(cells, tokenizer=tokenizer)["input_ids"][:]
    for source in (cells, formats.write_tenx_folder(cells, tmp_path / "a", shuffled=True)):
        assert [row["input_ids"].tolist() for row in stream_cells(source, tokenizer=tokenizer, shard_cells=7)] == expected


def test_shuffled_every_cell_comes_once_an_epoch_in_another_order(make, ids):
    stream = make(shuffle=True, seed=3, mix=3)
    epochs = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        epochs.append(read(stream))
        assert sorted(epochs[-1]) == sorted(ids)
        assert read(stream) == epochs[-1], "the same epoch again"
    assert len({tuple(e) for e in [*epochs, ids]}) == 4
    again = make(shuffle=True, seed=3, mix=3)
    again.set_epoch(2)
    assert read(again) == epochs[2], "the order of an epoch does not depend on the epochs before"
    assert read(make(shuffle=True, seed=4, mix=3)) != epochs[0]


def test_rows_are_mixed_across_shards_and_files(make, ids):
    place = {name: i for i, name in enumerate(ids)}
    order = np.array([place[name] for name in read(make(shuffle=True, mix=6))])
    neighbours = np.abs(np.diff(order))
    # Drawn at random, two neighbours lie a third of all cells apart on average; here six of fourteen shards are mixed.
    assert neighbours.mean() > len(ids) / 6
    assert (neighbours == 1).sum() < 10


@pytest.mark.parametrize("place", [1, 15, 16, 47, 48, 100, LEFT - 1, LEFT])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_stream_resumes_at_any_row(place, epoch, make):
    stream = make(shuffle=True, mix=3)
    stream.set_epoch(epoch)
    whole = read(stream)
    rows = iter(stream)
    seen = [next(rows)["cell_id"] for _ in range(place)]
    state = json.loads(json.dumps(stream.state_dict()))
    fresh = make(shuffle=True, mix=3)
    fresh.set_epoch(epoch)
    fresh.load_state_dict(state)
    assert seen + read(fresh) == whole


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("strategy", ["auto", "shards"])
def test_ranks_are_disjoint_and_complete_and_resume(world_size, strategy, make, ids):
    def of_rank(rank):
        stream = split_dataset_by_node(make(shuffle=True, mix=2), rank=rank, world_size=world_size, strategy=strategy)
        stream.set_epoch(1)
        return stream

    parts = [read(of_rank(rank)) for rank in range(world_size)]
    assert sorted(chain(*parts)) == sorted(ids)
    stream = of_rank(1)
    rows = iter(stream)
    seen = [next(rows)["cell_id"] for _ in range(11)]
    fresh = of_rank(1)
    fresh.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert seen + read(fresh) == parts[1]


def list_of(batch):
    return [row["cell_id"] for row in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_every_cell_once(num_workers, make, ids):
    stream = make(shuffle=True, mix=2)
    loader = DataLoader(stream, batch_size=10, num_workers=num_workers, collate_fn=list_of)
    assert sorted(chain(*loader)) == sorted(ids)
    ranks = [DataLoader(split_dataset_by_node(stream, rank, 2), batch_size=10, num_workers=num_workers, collate_fn=list_of) for rank in range(2)]
    assert sorted(chain(*ranks[0], *ranks[1])) == sorted(ids)


def test_workers_read_zarr_that_was_open_before_them(tmp_path, cells, tokenizer):
    stream = stream_cells(formats.write_zarr(cells, tmp_path / "a.zarr", 3), tokenizer=tokenizer, shard_cells=4, shuffle=True)
    before = read(stream)
    loader = DataLoader(stream, batch_size=10, num_workers=2, collate_fn=list_of, timeout=60)
    assert sorted(chain(*loader)) == sorted(before)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_with_workers_resumes(make, ids):
    def loader():
        return StatefulDataLoader(make(shuffle=True, mix=2), batch_size=10, num_workers=2, collate_fn=list_of)

    whole = list(loader())
    first = loader()
    batches = iter(first)
    seen = [next(batches) for _ in range(7)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert seen + list(second) == whole
    del batches


def test_a_state_brings_its_epoch(make):
    stream = make(shuffle=True, mix=3)
    stream.set_epoch(2)
    whole = read(stream)
    rows = iter(stream)
    seen = [next(rows)["cell_id"] for _ in range(20)]
    fresh = make(shuffle=True, mix=3)
    fresh.load_state_dict(stream.state_dict())
    assert fresh.epoch == 2
    assert seen + read(fresh) == whole


def test_a_state_of_another_stream_is_refused(make):
    stream = make(shuffle=True, mix=2)
    next(iter(stream))
    other = make(shuffle=True, mix=2, seed=9)
    other.load_state_dict(stream.state_dict())
    with pytest.raises(SettingError, match="saved by another stream"):
        next(iter(other))


def test_trainer_learns_from_a_stream(make, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(tiny_config(tokenizer, initializer_range=0.02))
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=48, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=12, save_strategy="no", report_to=[],
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=make(shuffle=True), data_collator=DataCollatorForMaskedGenes(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])


def test_what_cannot_be_streamed(tmp_path, folder, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CellFileError, match="no tokenized cells there"):
        stream_tokens(tmp_path / "empty")
    with pytest.raises(CellFileError, match="does not exist"):
        stream_tokens(tmp_path / "gone")
    with pytest.raises(CellFileError, match="has no column 'tissue'"):
        stream_tokens(folder / "tokens", columns=["tissue"])
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(CellFileError, match="cannot be read as a Parquet file"):
        stream_tokens(tmp_path / "bad.parquet")
    with pytest.raises(CellFileError, match="holds other columns"):
        load_cells(folder / "counts", tokenizer=tokenizer, obs="none", cache_dir=tmp_path / "cache").to_parquet(tmp_path / "other.parquet")
        stream_tokens([folder / "parquet", tmp_path / "other.parquet"])
    with pytest.raises(SettingError, match="mix is 0"):
        stream_tokens(folder / "tokens", mix=0)
    with pytest.raises(SettingError, match="seed is -1"):
        stream_tokens(folder / "tokens", seed=-1)


def test_a_stream_that_was_broken_off_leaves_the_next_one_alone(folder):
    """Its read-ahead may still be busy with the same Parquet file."""
    for _ in range(30):
        broken_off = iter(stream_tokens(folder / "parquet", shuffle=True, mix=1))
        next(broken_off)
        assert len(list(stream_tokens(folder / "parquet", shuffle=True, mix=1))) == len(list(stream_tokens(folder / "parquet")))


@pytest.mark.parametrize("kind", ["tokens", "parquet"])
def test_keys_of_cells_follow_from_the_cell_and_the_epoch_alone(folder, tokenizer, kind):
    def keys(epoch, world=1, rank=0, mix=2):
        stream = stream_tokens(folder / kind, shuffle=True, seed=3, shard_cells=4, mix=mix, cell_keys=True)
        stream.set_epoch(epoch)
        if world > 1:
            stream = split_dataset_by_node(stream, rank=rank, world_size=world)
            stream.set_epoch(epoch)
        return {row["cell_id"]: tuple(int(part) for part in row["cell_key"]) for row in stream}

    whole = keys(0)
    assert len(set(whole.values())) == len(whole) > 20
    assert keys(0, mix=5) == whole
    assert keys(0, world=2, rank=0) | keys(0, world=2, rank=1) == whole
    later = keys(1)
    assert {cell: key[:2] for cell, key in later.items()} == {cell: key[:2] for cell, key in whole.items()}
    assert len({key[2] for key in (*whole.values(), *later.values())}) == 2
    assert "cell_key" not in stream_tokens(folder / kind).features
