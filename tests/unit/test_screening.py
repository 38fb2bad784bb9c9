"""Screening: estimates that rank, exact values where they are run, cells run in whole that judge them."""

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from geneformer_hf import InSilicoPerturber, Perturbation, StateShift, StateVectors
from geneformer_hf.analysis import perturbation_plan
from geneformer_hf.analysis.screening import screening_quality
from geneformer_hf.errors import SettingError
from geneformer_hf.models.loading import fingerprint_of
from tests.tolerances import SAME_MODEL

PASSES, TOP = 2, 6


def make_dataset(tokenizer, lengths=(3, 25, 31, 40, 36)):
    rng = np.random.default_rng(0)
    first, last = ([tokenizer.cls_token_id], [tokenizer.eos_token_id]) if tokenizer.cls_token_id is not None else ([], [])
    tokens = np.asarray(tokenizer.gene_table.token_ids)
    cells = [first + rng.permutation(tokens)[:length].tolist() + last for length in lengths]
    return datasets.Dataset.from_dict({"input_ids": cells, "cell_id": [f"c{i}" for i in range(len(cells))], "state": ["a"] * (len(cells) - 1) + ["b"]})


def perturber_of(model, tokenizer, *, pooling, towards):
    options = {}
    if towards:
        vectors = {name: np.random.default_rng(i).normal(size=16) for i, name in enumerate("ab")}
        options = {"states": StateShift(column="state", start="a", goal="b"), "vectors": StateVectors(vectors, fingerprint_of(model), PASSES, pooling)}
    return InSilicoPerturber(model, tokenizer=tokenizer, pooling=pooling, layer=PASSES, progress=False, **options)


def frame_of(table):
    frame = table.to_pandas()
    return frame.assign(gene=frame.genes.str[0]).drop(columns="genes").set_index(["cell_id", "readout", "target", "gene"])


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("towards", [False, True], ids=["itself", "state"])
@pytest.mark.parametrize(("version", "pooling"), [("v1_", "mean"), ("", "mean"), ("", "cls")], ids=["v1_mean", "v2_mean", "v2_cls"])
def test_the_best_by_estimate_are_run_and_judged_cells_in_whole(request, kind, towards, version, pooling):
    tokenizer, model = (request.getfixturevalue(f"{version}{name}") for name in ("tokenizer", "model"))
    cells, perturber = make_dataset(tokenizer), perturber_of(model, tokenizer, pooling=pooling, towards=towards)
    whole = frame_of(perturber.run(cells, Perturbation.every(kind)))
    screened = frame_of(perturber.run(cells, Perturbation.screen(kind, top=TOP, judged=2)))
    readout, target = ("state", "b") if towards else ("cell", "")
    estimated = screened.xs((f"estimated_{readout}", target), level=["readout", "target"])["value"]
    exact = screened.drop(f"estimated_{readout}", level="readout")["value"]
    # What is run has the values of a scan.
    pd.testing.assert_series_equal(exact, whole["value"].reindex(exact.index), atol=SAME_MODEL, rtol=0)
    first, last = "c0", "c3" if towards else "c4"
    sizes = exact.xs((readout, target), level=["readout", "target"]).groupby("cell_id").size().to_dict()
    everything = whole.xs((readout, target), level=["readout", "target"])["value"]
    for cell, n in sizes.items():
        assert n == (everything[cell].size if cell in (first, last) else TOP), cell
    # A cell of three genes has no estimates; all genes of the others have.
    assert set(estimated.index.get_level_values(0)) == set(sizes) - {first}
    for cell in set(sizes) - {first}:
        assert set(estimated[cell].index) == set(everything[cell].index)
        ranked = estimated[cell].sort_values(ascending=readout == "cell", kind="stable").index[:TOP]
        assert set(ranked) <= set(exact.xs((readout, target), level=["readout", "target"])[cell].index)
    # Of random weights; benchmarks/bench_screen.py measures a trained model on real cells.
    assert np.mean([estimated[cell].corr(everything[cell], method="spearman") for cell in set(sizes) - {first}]) > 0.6
    quality = screening_quality(perturber.run(cells, Perturbation.screen(kind, top=TOP, judged=2)), top=TOP)
    expected = estimated[last].corr(everything[last], method="spearman")
    assert quality.n_cells == 1
    assert quality.spearman == pytest.approx(expected, abs=1e-4)


def test_more_anchors_are_nearer(model, tokenizer):
    cells, perturber = make_dataset(tokenizer, (58,)), perturber_of(model, tokenizer, pooling="cls", towards=False)
    exact = frame_of(perturber.run(cells, Perturbation.every("delete"))).value.droplevel(["readout", "target"])
    off = []
    for anchors in (2, 30):
        table = frame_of(perturber.run(cells, Perturbation.screen("delete", anchors=anchors, judged=0)))
        off.append((table.xs("estimated_cell", level="readout").value.droplevel("target") - exact).abs().mean())
    assert off[1] < off[0] / 2


def test_a_screening_is_written_in_parts_and_goes_on(model, tokenizer, tmp_path, monkeypatch):
    cells, wanted = make_dataset(tokenizer, [20] * 9), Perturbation.screen("delete", top=4)
    perturber = InSilicoPerturber(model, tokenizer=tokenizer, progress=False)
    table = perturber.run(cells, wanted)
    assert perturber.plan(cells, wanted, probe=False).n_rows == table.num_rows
    assert "180 genes estimated" in perturber.plan(cells, wanted).describe()
    monkeypatch.setattr(perturbation_plan, "VARIANTS_PER_PART", 8)
    assert len(list(perturber.plan(cells, wanted, probe=False).parts())) > 3
    written = pq.read_table(perturber.write(cells, wanted, tmp_path / "screened.parquet"))
    pd.testing.assert_frame_equal(written.to_pandas(), table.to_pandas(), atol=SAME_MODEL, rtol=0)
    assert screening_quality(tmp_path / "screened.parquet", top=4).n_cells == 1


def test_parameters_are_left_as_they_were(model, tokenizer):
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(wanted.values())
    InSilicoPerturber(model, tokenizer=tokenizer, progress=False).run(make_dataset(tokenizer), Perturbation.screen("delete"))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


def test_quality_is_told_from_the_cells_with_all_values():
    rows = [("x", "estimated_cell", g, v) for g, v in zip("ABCD", [0.1, 0.2, 0.3, 0.4], strict=True)]
    rows += [("x", "cell", g, v) for g, v in zip("ABCD", [0.1, 0.4, 0.3, 0.2], strict=True)]
    rows += [("y", "estimated_cell", "A", 0.5), ("y", "estimated_cell", "B", 0.6), ("y", "cell", "A", 0.5)]
    table = [{"cell_id": c, "kind": "delete", "genes": [g], "target": "", "readout": r, "value": v, "n_genes": 3} for c, r, g, v in rows]
    quality = screening_quality(pd.DataFrame(table), top=2)
    # Best by estimate A and B, by value A and D; ranks 1234 against 1432.
    assert (quality.n_cells, quality.recall) == (1, 0.5)
    assert quality.spearman == pytest.approx(0.2)
    assert (
        quality.describe()
        == "estimates against exact values of all genes of 1 cells: rank correlation 0.20, 50% of the exact top 2 are among the estimated top 2"
    )
    assert screening_quality(pd.DataFrame(table[-3:])) is None
    assert screening_quality(pd.DataFrame([table[4]])) is None


@pytest.mark.parametrize(
    ("settings", "wanted", "message"),
    [
        ({}, {"kind": "inhibit"}, "kind is 'inhibit'; estimates are for delete and overexpress"),
        ({}, {"kind": "delete", "top": 0}, "top is 0; expected 1 or more"),
        ({}, {"kind": "delete", "anchors": 1}, "anchors is 1; expected 2 or more"),
        ({}, {"kind": "delete", "judged": -1}, "judged is -1; expected 0 or more"),
        ({}, {"kind": "delete", "towards": "b"}, r"screening towards 'b': expected one of the states of this run \(there are none; give states\)"),
        ({"layer": 0}, {"kind": "delete"}, "layer is 0, the embedding layer"),
    ],
)
def test_what_cannot_be_screened(model, tokenizer, settings, wanted, message):
    with pytest.raises(SettingError, match=message):
        InSilicoPerturber(model, tokenizer=tokenizer, progress=False, **settings).run(make_dataset(tokenizer), Perturbation.screen(**wanted))
