"""Which cells training shows, and how they fall into steps and batches."""

from itertools import islice

import datasets
import numpy as np
import pytest

from geneformer_hf.data.batching import BatchPlan, RankBatches
from geneformer_hf.data.masking import CellKey
from geneformer_hf.data.mixtures import Corpus, KeyedCells, Mixture
from geneformer_hf.errors import CellFileError, SettingError


def corpus(name, n, seed=0, **options):
    rng = np.random.default_rng(seed)
    return Corpus(name, datasets.Dataset.from_dict({"input_ids": [rng.integers(4, 64, rng.integers(3, 41)).tolist() for _ in range(n)]}), **options)


@pytest.fixture(scope="module")
def new():
    return corpus("new", 1000, seed=1, held_out=50)


@pytest.fixture(scope="module")
def old():
    return corpus("old", 300, seed=2)


def shown(mixture, n):
    """The first n cells as an array of corpus, row, pass."""
    blocks = islice(mixture.blocks(), -(-n // 1024))
    return np.concatenate([np.stack(block, axis=1) for block in blocks])[:n]


def tokens(plan, batch):
    return [int(plan.mixture.corpora[key.corpus].lengths[key.row]) for key in batch]


def test_every_training_cell_comes_once_a_pass_and_held_out_ones_never(new):
    cells = shown(Mixture([new], seed=3), 3 * new.n_train)
    for number in range(3):
        rows = cells[cells[:, 2] == number][:, 1]
        assert sorted(rows.tolist()) == sorted(set(range(1000)) - set(new.held_out_rows.tolist()))
    assert cells[:950, 1].tolist() != cells[950:1900, 1].tolist()


def test_the_same_cells_are_held_out_of_a_dataset_whatever_the_run(new):
    """Fewer are part of more, so that going on from a model does not evaluate on what it was trained on."""
    fewer, seeded = Corpus("new", new.cells, held_out=20), Corpus("other name", new.cells, held_out=50)
    assert set(fewer.held_out_rows.tolist()) < set(new.held_out_rows.tolist())
    np.testing.assert_array_equal(seeded.held_out_rows, new.held_out_rows)
    assert seeded.fingerprint == new.fingerprint != fewer.fingerprint


def test_the_fingerprint_tells_corpora_apart_and_not_where_they_lie(new, tmp_path):
    new.cells.save_to_disk(tmp_path / "copy")
    copy = datasets.load_from_disk(tmp_path / "copy")
    assert Corpus("copy", copy, held_out=50).fingerprint == new.fingerprint
    changed = new.cells.map(lambda row, i: {"input_ids": row["input_ids"][::-1] if i == 0 else row["input_ids"]}, with_indices=True)
    assert Corpus("changed", changed, held_out=50).fingerprint != new.fingerprint


@pytest.mark.parametrize("weights", [(0.9, 0.1), (1.0, 1.0), (0.001, 0.999), (3.0, 1.0)])
def test_a_mixture_keeps_its_shares_to_one_cell(new, old, weights):
    mixture = Mixture([new, old], weights, seed=0)
    share = weights[1] / sum(weights)
    cells = shown(mixture, 40 * 1024)
    for n in (1024, 5 * 1024, 40 * 1024):  # whole blocks
        assert abs((cells[:n, 0] == 1).sum() - share * n) <= 1
    assert mixture.cells_per_epoch == round(950 * sum(weights) / weights[0])
    # Nothing of a corpus comes again before all of it has come.
    for number, size in ((0, 950), (1, 300)):
        rows = cells[cells[:, 0] == number]
        np.testing.assert_array_equal(rows[:, 2], np.arange(len(rows)) // size)
        for start in range(0, len(rows) - size, size):
            assert len(set(rows[start : start + size, 1].tolist())) == size


def test_without_weights_each_cell_comes_once_an_epoch(new, old):
    mixture = Mixture([new, old], seed=0)
    assert mixture.cells_per_epoch == 1250
    cells = shown(mixture, 2500)
    for number in range(2):
        part = cells[number * 1250 : (number + 1) * 1250]
        assert (part[:, 2] == number).all()
        assert len({tuple(cell) for cell in part.tolist()}) == 1250
        assert (part[:, 0] == 1).sum() == 300


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("grouped", [True, False])
def test_steps_of_cells_have_their_size_and_show_all_cells(new, layout, grouped):
    plan = BatchPlan(Mixture([new], seed=0), batches_per_step=4, cells_per_batch=3, layout=layout, group_by_length=grouped)
    steps = list(plan.steps(0)) + list(plan.steps(1))
    assert len(steps) == 2 * plan.steps_per_epoch == 2 * 80
    assert {len(batch) for step in steps for batch in step} == {3}
    cells = [key for step in steps for batch in step for key in batch]
    assert len(set(cells)) == len(cells) == 1920
    if not grouped:
        assert {key.row for key in cells if key.showing == 0} == set(range(1000)) - set(new.held_out_rows.tolist())


def test_the_plan_is_the_same_for_any_division_of_the_batches(new):
    def of(rank, world, accumulation, cells):
        plan = BatchPlan(Mixture([new], seed=0), batches_per_step=world * accumulation, cells_per_batch=cells, layout="packed")
        batches = list(RankBatches(plan, rank=rank, world_size=world))
        return [sorted(key for batch in batches[i : i + accumulation] for key in batch) for i in range(0, len(batches), accumulation)]

    whole = of(0, 1, 1, 12)
    assert of(0, 1, 4, 3) == whole
    for world, accumulation, cells in ((4, 1, 3), (2, 2, 3), (3, 1, 4)):
        ranks = [of(rank, world, accumulation, cells) for rank in range(world)]
        assert [sorted(key for part in parts for key in part) for parts in zip(*ranks, strict=True)] == whole


def test_packed_batches_of_a_step_have_about_as_many_tokens_each(new):
    plan = BatchPlan(Mixture([new], seed=0), batches_per_step=4, cells_per_batch=8, layout="packed")
    spreads = [max(sums) - min(sums) for step in plan.steps() for sums in [[sum(tokens(plan, batch)) for batch in step]]]
    assert np.mean(spreads) < 15


def test_grouping_saves_pads(new):
    def padding(**options):
        plan = BatchPlan(Mixture([new], seed=0), batches_per_step=1, layout="padded", **options)
        lengths = [tokens(plan, batch) for step in plan.steps() for batch in step]
        return sum(max(batch) * len(batch) for batch in lengths) / sum(map(sum, lengths))

    assert padding(cells_per_batch=16) > 1.5
    assert padding(cells_per_batch=16, group_by_length=True) < 1.1
    assert padding(tokens_per_batch=300) < 1.1


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_batches_of_tokens_stay_within_their_bound_and_lose_no_cell(new, layout):
    plan = BatchPlan(Mixture([new], seed=0), batches_per_step=3, tokens_per_batch=150, layout=layout)
    steps = list(plan.steps(0)) + list(plan.steps(1)) + list(plan.steps(2))
    cost = [max(t) * len(t) if layout == "padded" else sum(t) for step in steps for batch in step for t in [tokens(plan, batch)]]
    assert max(cost) <= 150
    assert np.mean(cost) > 125
    cells = [key for step in steps for batch in step for key in batch]
    assert len(set(cells)) == len(cells)
    windows = 50 * 3 * (150 // 22)
    whole = len(cells) // 950 - (windows // 950 + 1)
    for number in range(whole):
        assert sum(key.showing == number for key in cells) == 950
    assert {len(step) for step in steps} == {3}


def test_an_epoch_does_not_depend_on_where_one_begins(new):
    sampler = RankBatches(BatchPlan(Mixture([new], seed=0), batches_per_step=2, tokens_per_batch=150, layout="padded"))
    epochs = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    fresh = RankBatches(BatchPlan(Mixture([new], seed=0), batches_per_step=2, tokens_per_batch=150, layout="padded"))
    fresh.set_epoch(2)
    assert list(fresh) == epochs[2] != epochs[1]
    assert len(fresh) == len(epochs[0]) == len(epochs[2])


def test_cells_are_read_by_their_keys_whatever_their_corpus(new, old):
    cells = KeyedCells([new, old])
    keys = [CellKey(1, 7, 0), CellKey(0, 3, 2), CellKey(1, 7, 5)]
    found = cells.__getitems__(keys)
    assert [cell["cell_key"] for cell in found] == keys
    assert [cell["input_ids"].tolist() for cell in found] == [old.cells[7]["input_ids"], new.cells[3]["input_ids"], old.cells[7]["input_ids"]]
    assert cells[keys[1]]["input_ids"].tolist() == new.cells[3]["input_ids"]
    assert len(cells) == 1250


def test_a_selection_of_a_dataset_reads_its_own_rows(new):
    chosen = Corpus("chosen", new.cells.select([5, 900, 17]))
    assert [cell.tolist() for cell in chosen.read([2, 0])] == [new.cells[17]["input_ids"], new.cells[5]["input_ids"]]
    np.testing.assert_array_equal(chosen.lengths, [len(new.cells[i]["input_ids"]) for i in (5, 900, 17)])


def test_a_corpus_smaller_than_a_batch_comes_several_times_in_it():
    tiny = corpus("tiny", 3)
    plan = BatchPlan(Mixture([tiny], seed=0), batches_per_step=1, cells_per_batch=8)
    (step,) = plan.steps()
    assert sorted(key.row for key in step[0] if key.showing == 0) == [0, 1, 2]
    assert len(set(step[0])) == 8


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: corpus("x", 10, held_out=10), SettingError, r"x: 10 of 10 cells cannot be held out"),
        (lambda: Corpus("x", datasets.Dataset.from_dict({"text": ["a"]})), CellFileError, r"x: no column 'input_ids'; found text"),
        (lambda: Corpus("x", datasets.Dataset.from_dict({"input_ids": []})), CellFileError, r"x: no cells in it"),
        (
            lambda: Corpus("x", datasets.Dataset.from_dict({"input_ids": [[1.5]]})),
            CellFileError,
            r"x: input_ids holds List\(Value\('float64'\)\); expected lists of token ids",
        ),
        (lambda: Corpus("x", datasets.Dataset.from_dict({"input_ids": [1, 2]})), CellFileError, r"x: input_ids holds Value"),
        (lambda: Corpus("x", datasets.Dataset.from_dict({"input_ids": [[1], None]})), CellFileError, r"x: 1 of the cells from row 0 on are missing"),
        (lambda: Corpus("x", datasets.DatasetDict()), CellFileError, r"x is a DatasetDict; expected a datasets.Dataset"),
        (lambda: Mixture([corpus("x", 10)], [0.5, 0.5]), SettingError, r"weights \[0\.5, 0\.5\] for 1 corpora"),
        (lambda: Mixture([corpus("x", 10)], [0.0]), SettingError, r"expected one number above 0"),
        (
            lambda: BatchPlan(Mixture([corpus("x", 10)]), batches_per_step=1, tokens_per_batch=8),
            SettingError,
            r"max_tokens_per_batch is 8, and the longest cell has",
        ),
        (lambda: RankBatches(BatchPlan(Mixture([corpus("x", 10)]), batches_per_step=3, cells_per_batch=1), world_size=2), SettingError, "cannot be dealt to 2"),
    ],
)
def test_what_cannot_be_planned(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_lists_of_any_kind_are_read_alike(new):
    rows = [[5, 6, 7], [8, 9, 10]]
    for kind in (datasets.List(datasets.Value("uint16")), datasets.LargeList(datasets.Value("int64")), datasets.List(datasets.Value("int32"), length=3)):
        found = Corpus("x", datasets.Dataset.from_dict({"input_ids": rows}, features=datasets.Features({"input_ids": kind})))
        assert [cell.tolist() for cell in found.read([1, 0])] == rows[::-1]
        assert found.lengths.tolist() == [3, 3]


def test_a_column_of_lengths_is_not_believed():
    assert Corpus("x", datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "length": [99]})).lengths.tolist() == [3]


@pytest.mark.parametrize("options", [{"cells_per_batch": 3, "group_by_length": True, "layout": "padded"}, {"tokens_per_batch": 150, "layout": "padded"}])
def test_no_cell_comes_again_in_sorted_batches_before_all_have_come(options):
    plan = BatchPlan(Mixture([corpus("x", 142)], seed=0), batches_per_step=1, **options)
    cells = [key for epoch in range(6) for step in plan.steps(epoch) for batch in step for key in batch]
    shown = np.bincount([key.row for key in cells], minlength=142)
    assert shown.max() - shown.min() <= 2
