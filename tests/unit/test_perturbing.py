"""Every readout of the perturber against explicit passes; batches, order, parts and files change nothing; what cannot be done is refused."""

import json

import datasets
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_hf import GeneformerForSequenceClassification, InSilicoPerturber, Perturbation, StateShift, StateVectors
from geneformer_hf.analysis import perturbation_plan, perturbing
from geneformer_hf.errors import CellFileError, LayerError, OutputError, OutputExistsError, SettingError, UnknownGeneError, VocabularyMismatchError
from geneformer_hf.models import variants
from geneformer_hf.models.loading import fingerprint_of
from tests import reference
from tests.conftest import ensembl, tiny_config
from tests.tolerances import BF16_PERTURBATION, NAIVE_TWIN, SAME_MODEL

LAYER, PASSES = -2, 2


def make_dataset(tokenizer, n=9, seed=0):
    """Cells of 1 to 62 genes; the last fills all that the model takes."""
    rng = np.random.default_rng(seed)
    first, last = ([tokenizer.cls_token_id], [tokenizer.eos_token_id]) if tokenizer.cls_token_id is not None else ([], [])
    tokens = np.asarray(tokenizer.gene_table.token_ids)
    most = min(64 - len(first) - len(last), len(tokens))
    lengths = [1, 2, *rng.integers(5, 30, n - 3).tolist(), most]
    cells = [first + rng.permutation(tokens)[:length].tolist() + last for length in lengths]
    return datasets.Dataset.from_dict({"input_ids": cells, "cell_id": [f"c{i}" for i in range(n)], "state": ["a", "b", "c"] * (n // 3)})


def by_variant(table, tokenizer, readout):
    frame = table.to_pandas()
    frame = frame[frame["readout"] == readout]
    return {(row.cell_id, tuple(tokenizer.gene_table.token_of(row.genes).tolist()), row.target): (row.value, row.n_genes) for row in frame.itertuples()}


LISTS = {
    "one_by_one": lambda g, kind: Perturbation.each(kind, g[:8]),
    "together": lambda g, kind: [Perturbation(kind=kind, genes=tuple(g[10:13]))],
    "pairs": lambda g, kind: Perturbation.pairs(kind, g[20:23]),
    "anchor": lambda g, kind: Perturbation.with_anchor(kind, g[30], g[31:34]),
    "every": lambda g, kind: Perturbation.every(kind),
}


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("asked", list(LISTS))
@pytest.mark.parametrize(("version", "pooling"), [("v1_", "mean"), ("", "mean"), ("", "cls")], ids=["v1_mean", "v2_mean", "v2_cls"])
def test_every_readout_equals_explicit_passes(request, kind, asked, version, pooling):
    tokenizer, model = (request.getfixturevalue(f"{version}{name}") for name in ("tokenizer", "model"))
    cells = make_dataset(tokenizer)
    names = list(tokenizer.gene_table.ensembl_ids)
    vectors = {name: np.random.default_rng(i).normal(size=16) for i, name in enumerate("abc")}
    states = StateVectors(vectors, fingerprint_of(model), PASSES, pooling)
    shift = StateShift(column="state", start="c", goal="a", alternatives=("b",))
    wanted = LISTS[asked](names, kind)
    options = {"tokenizer": tokenizer, "pooling": pooling, "layer": LAYER, "progress": False}
    tables = {
        "gene": InSilicoPerturber(model, readout="gene", **options).run(cells, wanted),
        "state": InSilicoPerturber(model, states=shift, vectors=states, **options).run(cells, wanted),
        "cell": InSilicoPerturber(model, **options).run(cells, wanted),
    }
    ensembl_of = dict(zip(tokenizer.gene_table.token_ids.tolist(), names, strict=True))
    for readout, table in tables.items():
        found = by_variant(table, tokenizer, readout)
        expected = {}
        for cell in cells:
            if readout == "state" and cell["state"] != "c":
                continue
            first = int(tokenizer.cls_token_id is not None)
            genes = cell["input_ids"][first : len(cell["input_ids"]) - first]
            listed = [[gene] for gene in genes] if asked == "every" else [tokenizer.gene_table.token_of(p.genes).tolist() for p in wanted]
            for chosen in listed:
                want = reference.shifts(model, cell["input_ids"], kind, chosen, layer=LAYER, pooling=pooling, states=vectors)
                if want is None:
                    continue
                values = {"cell": {"": want["cell"]}, "state": want["state"], "gene": {ensembl_of[gene]: v for gene, v in want["gene"].items()}}[readout]
                for target, value in values.items():
                    expected[cell["cell_id"], tuple(chosen), target] = value, len(want["gene"])
        assert set(found) == set(expected)
        for key, (value, n_genes) in expected.items():
            assert found[key][1] == n_genes
            if not np.isnan(value):
                assert found[key][0] == pytest.approx(value, abs=NAIVE_TWIN), key


@pytest.mark.parametrize("kind", ["inhibit", "activate"])
def test_shifted_ranks_equal_explicit_passes(model, tokenizer, kind):
    from geneformer_hf.analysis.perturbations import Change, changed

    cells = make_dataset(tokenizer)
    table = InSilicoPerturber(model, tokenizer=tokenizer, pooling="cls", progress=False).run(cells, Perturbation.every(kind, quartiles=2))
    found = by_variant(table, tokenizer, "cell")
    assert found
    for cell in cells.select(range(3)):
        genes = np.array(cell["input_ids"][1:-1])
        for gene in genes.tolist():
            after = changed(genes, Change(kind, (gene,), quartiles=2), most=62)
            key = cell["cell_id"], (gene,), ""
            assert (key in found) == (after is not None)
            if after is not None:
                new, old = (reference.embed_cell(model, [2, *tokens.tolist(), 3], LAYER, "cls") for tokens in (after.tokens, genes))
                assert found[key][0] == pytest.approx(new @ old / np.linalg.norm(new) / np.linalg.norm(old), abs=NAIVE_TWIN)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_probabilities_of_a_classifier(tokenizer, pooling):
    torch.manual_seed(1)
    config = tiny_config(
        tokenizer,
        pooling=pooling,
        id2label={0: "B", 1: "T"},
        label2id={"B": 0, "T": 1},
        label_columns=["cell_type"],
        problem_type="single_label_classification",
    )
    model = GeneformerForSequenceClassification(config).eval()
    cells = make_dataset(tokenizer)
    table = InSilicoPerturber(model, tokenizer=tokenizer, readout="probability", progress=False).run(cells, Perturbation.every("delete"))
    found = by_variant(table, tokenizer, "probability")

    def said(tokens):
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits.softmax(-1)[0].numpy()

    for cell in cells.select([1, 3]):
        whole = cell["input_ids"]
        for i in range(1, len(whole) - 1):
            shift = said(whole[:i] + whole[i + 1 :]) - said(whole)
            for name, value in zip(("B", "T"), shift, strict=True):
                assert found[cell["cell_id"], (whole[i],), name][0] == pytest.approx(float(value), abs=NAIVE_TWIN)


@pytest.mark.parametrize(("batch_size", "tokens", "at_once"), [(1, 2048, 32), (3, 64, 2), (None, 50, 1), (None, 100_000, 32)])
def test_batches_and_budgets_change_nothing(model, tokenizer, monkeypatch, batch_size, tokens, at_once):
    from geneformer_hf.models import encoding

    cells, options = make_dataset(tokenizer), {"tokenizer": tokenizer, "readout": "gene", "pooling": "mean", "progress": False}
    wanted = {kind: Perturbation.every(kind) for kind in ("delete", "overexpress")} | {
        "listed": Perturbation.each("overexpress", list(tokenizer.gene_table.ensembl_ids)[:20])
    }
    whole = {name: InSilicoPerturber(model, **options).run(cells, w) for name, w in wanted.items()}
    monkeypatch.setattr(encoding, "TOKENS_PER_PASS_ON_CPU", tokens)
    monkeypatch.setattr(perturbing, "CELLS_AT_ONCE", at_once)
    for name, w in wanted.items():
        again = InSilicoPerturber(model, batch_size=batch_size, **options).run(cells, w)
        assert again.drop_columns("value").equals(whole[name].drop_columns("value"))
        np.testing.assert_allclose(again["value"].to_numpy(), whole[name]["value"].to_numpy(), atol=SAME_MODEL)


def test_a_run_into_a_file_goes_on_where_it_stopped(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(perturbation_plan, "VARIANTS_PER_PART", 40)
    cells, wanted = make_dataset(tokenizer), Perturbation.every("delete")
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, progress=False)
    whole, n_written = pq.read_table(perturber.write(cells, wanted, tmp_path / "whole.parquet")), []
    write = perturbing.write_part

    def stop_at_the_third(table, path):
        if len(n_written) == 2:
            raise KeyboardInterrupt
        n_written.append(path)
        write(table, path)

    monkeypatch.setattr(perturbing, "write_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        perturber.write(cells, wanted, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(OutputExistsError, match=r"holds finished parts of another plan for .*out.parquet \(other changes\)"):
        perturber.write(cells, Perturbation.every("overexpress"), tmp_path / "out.parquet")
    again = []
    monkeypatch.setattr(perturbing, "write_part", lambda table, path: (again.append(path), write(table, path)))
    found = perturber.write(cells, wanted, tmp_path / "out.parquet")
    assert pq.read_table(found).equals(whole)
    assert len(again) == len(list(perturber.plan(cells, wanted, probe=False).parts())) - 2
    assert {p.name for p in tmp_path.iterdir()} == {"whole.parquet", "out.parquet"}
    monkeypatch.setattr(perturber, "iter_cells", None)
    assert pq.read_table(perturber.write(cells, wanted, tmp_path / "out.parquet")).equals(whole)


def test_an_output_of_another_plan_is_kept(model, tokenizer, tmp_path):
    cells = make_dataset(tokenizer)
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, progress=False)
    perturber.write(cells, Perturbation.every("delete"), tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    for other, wanted in ((cells.select(range(4)), Perturbation.every("delete")), (cells, Perturbation.every("overexpress"))):
        with pytest.raises(OutputExistsError, match="exists and was made otherwise"):
            perturber.write(other, wanted, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == before
    perturber.write(cells, Perturbation.every("overexpress"), tmp_path / "out.parquet", overwrite=True)
    assert set(pq.read_table(tmp_path / "out.parquet")["kind"].to_pylist()) == {"overexpress"}


def test_the_plan_says_what_will_be_done(model, tokenizer):
    cells = make_dataset(tokenizer)
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, readout="gene", pooling="mean", progress=False)
    plan = perturber.plan(cells, Perturbation.every("delete"))
    genes = [len(cell) - 2 for cell in cells["input_ids"][:]]
    assert plan.n_variants == sum(n for n in genes if n > 1)
    assert plan.n_rows == sum(n + n * (n - 1) for n in genes if n > 1)
    assert plan.n_rows == perturber.run(cells, Perturbation.every("delete")).num_rows
    assert plan.seconds > 0
    assert plan.describe().startswith(f"9 cells of 1 to {max(genes)} genes; {plan.n_variants:,} variants to run")


def test_states_are_computed_from_the_cells_and_kept(model, tokenizer, tmp_path):
    cells = make_dataset(tokenizer)
    shift = StateShift(column="state", start="c", goal="a")
    options = {"tokenizer": tokenizer, "states": shift, "progress": False}
    table = InSilicoPerturber(model, **options).run(cells, Perturbation.every("delete"))
    assert set(table["cell_id"].to_pylist()) <= {"c2", "c5", "c8"}
    StateVectors.of(model, cells, "state", n_layers=PASSES, pooling="cls", tokenizer=tokenizer, progress=False).save(tmp_path / "states.json")
    vectors = StateVectors.load(tmp_path / "states.json")
    # Start cells alone are enough then.
    again = InSilicoPerturber(model, vectors=vectors, **options).run(cells, Perturbation.every("delete"))
    np.testing.assert_allclose(again["value"].to_numpy(), table["value"].to_numpy(), atol=SAME_MODEL)
    with pytest.raises(SettingError, match="vectors of states were made with layer 2 and not 3"):
        InSilicoPerturber(model, vectors=vectors, layer=-1, **options).run(cells, Perturbation.every("delete"))
    vectors = StateVectors(vectors.vectors, "another", PASSES, "cls")
    with pytest.raises(SettingError, match="made with model another and not"):
        InSilicoPerturber(model, vectors=vectors, **options).run(cells, Perturbation.every("delete"))
    (tmp_path / "bad.json").write_text(json.dumps({"vectors": 3}))
    with pytest.raises(CellFileError, match=r"bad\.json cannot be read as vectors of states"):
        StateVectors.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("settings", "wanted", "error", "message"),
    [
        ({}, [Perturbation(kind="delete", genes=("ENSG00000999999", ensembl(1)))], UnknownGeneError, "ENSG00000999999"),
        ({}, [], SettingError, "There are no perturbations"),
        ({"readout": "genes"}, None, SettingError, "readout is 'genes'; expected cell, gene or probability"),
        ({"readout": "probability"}, None, SettingError, "needs a model fine-tuned for classes of cells, and this is a GeneformerForMaskedLM"),
        ({"layer": 7}, None, LayerError, "layer 7 does not exist"),
        ({"pooling": "max"}, None, LayerError, "pooling 'max' is not"),
        ({"states": StateShift(column="state", start="a", goal="z")}, None, SettingError, "column 'state' has no cell in 'z'. Found: a, b, c"),
    ],
)
def test_what_cannot_be_done(model, tokenizer, settings, wanted, error, message):
    with pytest.raises(error, match=message):
        InSilicoPerturber(model, tokenizer=tokenizer, progress=False, **settings).run(
            make_dataset(tokenizer), Perturbation.every("delete") if wanted is None else wanted
        )


def test_genes_that_no_cell_expresses(model, tokenizer):
    cells = datasets.Dataset.from_dict({"input_ids": [[2, 4, 5, 6, 3]]})
    with pytest.raises(SettingError, match="There is nothing to do: none of 1 cells"):
        InSilicoPerturber(model, tokenizer=tokenizer, progress=False).run(cells, Perturbation.each("delete", [ensembl(40)]))


def test_start_and_goal_alike():
    with pytest.raises(SettingError, match="start and goal are both 'a'"):
        StateShift(column="state", start="a", goal="a")
    with pytest.raises(SettingError, match="alternatives name a state twice, or start or goal: b"):
        StateShift(column="state", start="a", goal="b", alternatives=("b",))


def test_a_pooling_that_the_vocabulary_lacks(v1_model, v1_tokenizer):
    with pytest.raises(LayerError, match="pooling 'cls' needs a <cls> token"):
        InSilicoPerturber(v1_model, tokenizer=v1_tokenizer, pooling="cls")


def test_cells_without_special_tokens_in_a_model_that_has_them(model, tokenizer):
    cells = datasets.Dataset.from_dict({"input_ids": [[4, 5, 6]]})
    with pytest.raises(VocabularyMismatchError, match="cell 0 does not begin with <cls>"):
        InSilicoPerturber(model, tokenizer=tokenizer, progress=False).run(cells, Perturbation.every("delete"))


def test_a_plan_too_large_for_the_disk(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(perturbation_plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match=r"The table will have .* rows, about 0.0 GB with its parts, and .* has 0.0 GB left"):
        InSilicoPerturber(model, tokenizer=tokenizer, progress=False).write(make_dataset(tokenizer), Perturbation.every("delete"), tmp_path / "out.parquet")


@pytest.mark.parametrize("asked", ["every", "pairs"])
def test_out_of_memory_passes_are_halved(model, tokenizer, monkeypatch, asked):
    cells, wanted = make_dataset(tokenizer), LISTS[asked](list(tokenizer.gene_table.ensembl_ids), "delete")
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, pooling="mean", progress=False)
    whole, refused = perturber.run(cells, wanted), []
    for name in ("encode_packed", "run_layers"):
        run = getattr(variants, name)

        def small_only(layers, states, lengths, *rest, run=run):
            if len(lengths) > 2:
                refused.append(len(lengths))
                raise torch.OutOfMemoryError
            return run(layers, states, lengths, *rest)

        monkeypatch.setattr(variants, name, small_only)
    again = InSilicoPerturber(model, tokenizer=tokenizer, pooling="mean", progress=False).run(cells, wanted)
    assert refused
    assert again.drop_columns("value").equals(whole.drop_columns("value"))
    np.testing.assert_allclose(again["value"].to_numpy(), whole["value"].to_numpy(), atol=SAME_MODEL)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_half_precision_is_near(pooling, tokenizer, model):
    """The model computes in half precision, the likeness of its vectors does not: else nothing would be left of small shifts."""
    cells, wanted = make_dataset(tokenizer), Perturbation.every("delete")
    full, half = (
        InSilicoPerturber(model, tokenizer=tokenizer, pooling=pooling, dtype=dtype, progress=False).run(cells, wanted)["value"].to_numpy()
        for dtype in (None, "bf16")
    )
    assert 0 < np.abs(full - half).max() < BF16_PERTURBATION
    assert np.corrcoef(full, half)[0, 1] > 0.9
    assert len(set(half)) > len(half) / 2


def test_states_are_told_apart_in_half_precision(tokenizer, model):
    cells = make_dataset(tokenizer)
    full, half = (
        InSilicoPerturber(model, tokenizer=tokenizer, dtype=dtype, states=StateShift(column="state", start="a", goal="b"), progress=False).run(
            cells, Perturbation.every("delete")
        )
        for dtype in (None, "bf16")
    )
    full, half = (found.filter(pc.equal(found["readout"], "state"))["value"].to_numpy() for found in (full, half))
    assert 0 < np.abs(full - half).max() < BF16_PERTURBATION
    assert len(set(half)) > len(half) / 2


def test_listed_genes_that_no_cell_expresses_are_named(model, tokenizer):
    cells = datasets.Dataset.from_dict({"input_ids": [[2, 4, 5, 6, 3]]})
    plan = InSilicoPerturber(model, tokenizer=tokenizer, progress=False).plan(cells, Perturbation.each("delete", [ensembl(1), ensembl(40)]))
    assert plan.never == (f"delete {ensembl(40)}",)
    assert f"1 of the perturbations can be made in none of the cells: delete {ensembl(40)}" in plan.describe()


def test_cells_of_one_id_are_told(model, tokenizer, caplog):
    cells = datasets.Dataset.from_dict({"input_ids": [[2, 4, 5, 6, 3]] * 3, "cell_id": ["x", "x", "y"]})
    InSilicoPerturber(model, tokenizer=tokenizer, progress=False).run(cells, Perturbation.every("delete"))
    assert "1 of 3 cells share their id with another (x (2 times)" in caplog.text


def test_parts_are_bounded_by_rows(model, tokenizer, monkeypatch):
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, readout="gene", pooling="mean", progress=False)
    monkeypatch.setattr(perturbation_plan, "ROWS_PER_PART", 1000)
    plan = perturber.plan(make_dataset(tokenizer), Perturbation.every("delete"), probe=False)
    parts = list(plan.parts())
    assert len(parts) > 2
    np.testing.assert_array_equal(np.concatenate(parts), plan.rows)
    assert all(plan.n_rows_n[part].sum() <= 1000 or len(part) == 1 for part in parts)


def test_the_goal_cells_belong_to_the_plan(model, tokenizer, tmp_path):
    """Other cells in the goal give other vectors, so that finished parts are of another plan."""
    cells = make_dataset(tokenizer)
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, states=StateShift(column="state", start="c", goal="a"), progress=False)
    perturber.write(cells, Perturbation.every("delete"), tmp_path / "out.parquet")
    rows = cells.to_list()
    rows[0]["input_ids"] = rows[3]["input_ids"]
    with pytest.raises(OutputExistsError, match="exists and was made otherwise"):
        perturber.write(datasets.Dataset.from_list(rows), Perturbation.every("delete"), tmp_path / "out.parquet")


def test_the_order_of_cells_changes_nothing(model, tokenizer):
    cells = make_dataset(tokenizer)
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, progress=False)
    keys = ["cell_id", "target"]
    tables = [perturber.run(some, Perturbation.every("delete")).to_pandas() for some in (cells, cells.select(range(8, -1, -1)))]
    frames = [t.assign(gene=[g[0] for g in t["genes"]]).drop(columns="genes").sort_values([*keys, "gene"]).reset_index(drop=True) for t in tables]
    pd.testing.assert_frame_equal(frames[0], frames[1], atol=SAME_MODEL)
