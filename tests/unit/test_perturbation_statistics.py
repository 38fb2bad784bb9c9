"""Statistics of perturbations: each remedy, effects within cells, pairs; against plain computations on made tables."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ranksums, wilcoxon

from geneformer_hf import GeneTable
from geneformer_hf.analysis import statistics
from geneformer_hf.analysis.effects import cooperativity, perturbation_effects
from geneformer_hf.analysis.perturbation_table import SCHEMA, rows_of
from geneformer_hf.analysis.statistics import perturbation_statistics, rank_sums
from geneformer_hf.errors import CellFileError, SettingError
from geneformer_hf.reports.perturbation_plots import plot_volcano
from tests.conftest import ensembl


def make_table(values, readout="cell", targets=("",), genes=None):
    """Values of shape `(cells, genes)`; NaN where a cell does not express a gene."""
    lines = []
    for cell, row in enumerate(values):
        for gene, value in enumerate(row):
            if np.isfinite(value):
                names = [ensembl(gene + 1)] if genes is None else list(genes[gene])
                lines += [
                    {"cell_id": f"c{cell}", "kind": "delete", "genes": names, "target": t, "readout": readout, "value": value, "n_genes": 9} for t in targets
                ]
    return pa.Table.from_pylist(lines, SCHEMA)


@pytest.fixture(scope="module")
def values():
    """Twelve cells, ten genes; the third moves cells down; cells differ more among each other than genes do."""
    rng = np.random.default_rng(0)
    made = 0.8 + rng.normal(0, 0.05, (12, 1)) + rng.normal(0, 0.004, (12, 10))
    made[:, 2] -= 0.03
    made[rng.random((12, 10)) < 0.1] = np.nan
    return made.astype(np.float32)


@pytest.mark.parametrize("leave_out", [False, True])
def test_rank_sums_are_those_of_scipy(leave_out):
    rng = np.random.default_rng(1)
    # Ties within groups, between them, and with the background.
    background = rng.integers(0, 12, 300) / 4
    codes = rng.integers(0, 20, 300)
    groups = [background[codes == code] for code in range(20)]
    found = rank_sums(background, groups, leave_out=leave_out)
    expected = [ranksums(background[codes != code] if leave_out else background, group).pvalue for code, group in enumerate(groups)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_background_may_leave_the_tested_gene_out(values):
    table = make_table(values, "state", ("goal",))
    usual, fair = (perturbation_statistics(table, "goal_state_shift", goal="goal", leave_out_tested=leave).set_index("Ensembl_ID") for leave in (False, True))
    assert fair.loc[ensembl(3), "Goal_end_vs_random_pval"] < usual.loc[ensembl(3), "Goal_end_vs_random_pval"]
    pd.testing.assert_series_equal(fair["Shift_to_goal_end"].sort_index(), usual["Shift_to_goal_end"].sort_index())


def test_donors_are_counted_in_place_of_cells(values):
    table = make_table(values, "state", ("goal",))
    donors = {f"c{i}": f"d{i % 3}" for i in range(12)}
    found = perturbation_statistics(table, "goal_state_shift", goal="goal", donors=donors).set_index("Ensembl_ID")
    assert set(found["N_Detections"]) == {3}
    of_donor = [np.nanmean(values[d::3, 2]) for d in range(3)]
    assert found.loc[ensembl(3), "Shift_to_goal_end"] == pytest.approx(np.mean(of_donor), abs=1e-6)
    with pytest.raises(SettingError, match="donors says nothing of 11 cells, the first 'c1'"):
        perturbation_statistics(table, "goal_state_shift", goal="goal", donors={"c0": "d"})


def test_components_of_the_mixture_may_be_ordered(values):
    # With this order the first component is the upper one.
    upside_down = make_table(np.nan_to_num(values[:, ::-1], nan=0.8))
    found = perturbation_statistics(upside_down, "mixture_model", order_components=True).set_index("Ensembl_ID")
    assert found["Impact_component"].to_dict() == {ensembl(i): int(i == 8) for i in range(1, 11)}


def test_values_of_one_perturbation(values):
    found = perturbation_statistics(make_table(values), "aggregate_data", genes=[ensembl(3)])
    np.testing.assert_allclose(found["Cosine_sim"], values[np.isfinite(values[:, 2]), 2])
    with pytest.raises(SettingError, match="aggregate_data is about one perturbation, and the table has 10"):
        perturbation_statistics(make_table(values), "aggregate_data")


def test_names_come_from_the_gene_table(values):
    table = GeneTable([ensembl(i) for i in range(1, 11)], range(4, 14), [1.0] * 10, [f"S{i}" for i in range(1, 11)])
    found = perturbation_statistics(make_table(values), "mixture_model", gene_table=table).set_index("Ensembl_ID")
    assert found.loc[ensembl(3), ["Gene", "Gene_name"]].tolist() == [6, "S3"]


@pytest.mark.parametrize(
    ("table", "mode", "message"),
    [
        ("cell", "median", "mode is 'median'; expected goal_state_shift"),
        ("cell", "goal_state_shift", "goal_state_shift needs the goal: the table does not say it"),
        ("state", "mixture_model", "the table has no values of readout 'cell'. It has: state of goal"),
        ("cell", "vs_null", "vs_null compares with another table"),
        ("cell", "aggregate_gene_shifts", "the table has no values of readout 'gene'. It has: cell"),
    ],
)
def test_tables_that_do_not_hold_what_a_mode_needs(values, table, mode, message):
    made = make_table(values, table, ("goal",) if table == "state" else ("",))
    with pytest.raises(SettingError, match=message):
        perturbation_statistics(made, mode)


def test_other_tables_are_refused():
    with pytest.raises(CellFileError, match="the table lacks the columns cell_id, kind, genes"):
        perturbation_statistics(pd.DataFrame({"value": [1.0]}), "mixture_model")


def test_effects_are_differences_within_cells(values):
    found = perturbation_effects(make_table(values), n_permutations=200).set_index("Ensembl_ID")
    mine = [row[2] - np.nanmean(np.delete(row, 2)) for row in values.astype(np.float64) if np.isfinite(row[2])]
    line = found.loc[ensembl(3)]
    assert line["effect"] == pytest.approx(np.mean(mine), abs=1e-6)
    assert line["effect_size"] == pytest.approx(np.mean(mine) / np.std(mine, ddof=1), rel=1e-4)
    assert line["p_paired"] == pytest.approx(wilcoxon(mine).pvalue)
    assert line["ci_low"] < line["effect"] < line["ci_high"] < 0
    # Cells differ so much that, taken as independent, nothing is found; within cells it stands out.
    assert found.index[0] == ensembl(3)
    assert line["fdr_paired"] < 0.05
    assert line["p_permutation"] == pytest.approx(1 / 201)
    assert (found.drop(ensembl(3))["p_permutation"] > 0.01).all()


def test_effects_over_donors(values):
    donors = {f"c{i}": f"d{i % 3}" for i in range(12)}
    found = perturbation_effects(make_table(values), donors=donors, n_permutations=0).set_index("Ensembl_ID")
    assert set(found["n_donors"]) == {3}
    # Three donors cannot come out under 0.05, so nothing is claimed.
    assert found["p_paired"].isna().all()
    assert found.loc[ensembl(3), "effect"] < -0.02


def test_a_permuted_null_is_calibrated():
    """Where no gene does anything, p-values are spread evenly."""
    rng = np.random.default_rng(3)
    table = make_table(0.9 + rng.normal(0, 0.1, (15, 1)) + rng.normal(0, 0.01, (15, 60)))
    p = perturbation_effects(table, n_permutations=300)["p_permutation"]
    assert 0.35 < p.mean() < 0.65
    assert (p < 0.05).mean() < 0.15


def test_pairs_against_the_sum_of_their_genes():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(0.01, 0.05, (2, 8))
    table = make_table(1 - np.stack([a, b, a + b + 0.02], axis=1), genes=[("A",), ("B",), ("A", "B")])
    (line,) = cooperativity(table).to_dict("records")
    assert line["excess"] == pytest.approx(0.02, abs=1e-6)
    assert line["sum_of_shifts"] == pytest.approx((a + b).mean(), abs=1e-6)
    assert (line["Ensembl_ID_1"], line["Ensembl_ID_2"], line["n_cells"]) == ("A", "B", 8)
    assert line["p_paired"] < 0.01
    with pytest.raises(SettingError, match="the table has no pair of genes together with each of them alone"):
        cooperativity(make_table(np.full((3, 2), 0.9)))


def test_shifts_of_genes_are_put_together_piece_by_piece(values, tmp_path, monkeypatch):
    """Several files, a few rows at a time, against plain means over all values; near one, where a sum of squares would lose the spread."""
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 7)
    values = (1 - values * 1e-4).astype(np.float32)
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, part in zip(parts, (values[:5], values[5:]), strict=True):
        whole = pa.concat_tables([make_table(part, "gene", (ensembl(20), ensembl(21))), make_table(part), make_table(part, "state", ("goal",))])
        pq.write_table(whole, path, row_group_size=11)
    found = perturbation_statistics(parts, "aggregate_gene_shifts").set_index(["Ensembl_ID", "Affected_Ensembl_ID"])
    assert len(found) == 30
    for gene in range(10):
        column = values[:, gene].astype(np.float64)
        for affected in (ensembl(20), ensembl(21), np.nan):
            row = found.loc[(ensembl(gene + 1), affected)]
            assert row["N_Detections"] == np.isfinite(column).sum()
            np.testing.assert_allclose(row["Cosine_sim_mean"], np.nanmean(column), rtol=1e-12)
            np.testing.assert_allclose(row["Cosine_sim_stdev"], np.nanstd(column), rtol=1e-7)


def test_a_table_of_several_readouts_says_what_it_has(values, tmp_path):
    whole = pa.concat_tables([make_table(values, "gene", (ensembl(20), ensembl(21))), make_table(values), make_table(values, "state", ("a", "b"))])
    path = tmp_path / "table.parquet"
    pq.write_table(whole, path)
    assert rows_of(path, "state", "b")["value"].tolist() == rows_of(whole.to_pandas(), "state", "b")["value"].tolist()
    frame = whole.to_pandas().astype({"value": np.float64})
    assert rows_of([path, frame, whole], "cell")["value"].tolist() == 3 * rows_of(path, "cell")["value"].tolist()
    with pytest.raises(SettingError, match=r"no values of readout 'state' for 'c'\. It has: gene, cell, state of a, state of b\."):
        rows_of(path, "state", "c")


def test_effects_below_the_resolution_of_float32_are_marked_and_warned_of(caplog, tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"ENSG{i:011d}" for i in range(40)]
    rows = [
        {
            "cell_id": f"c{cell}",
            "kind": "delete",
            "genes": [gene],
            "target": "",
            "readout": "cell",
            "value": np.float64(1.0 - (1e-9 if i < 30 else 1e-3) * rng.random()),
            "n_genes": 40,
        }
        for cell in range(10)
        for i, gene in enumerate(genes)
    ]
    table = pd.DataFrame(rows)
    small = table[[genes.index(g[0]) < 30 for g in table["genes"]]]
    found = perturbation_effects(small, n_permutations=20)
    assert found["below_resolution"].all()
    assert "30 of 30 effects are smaller than 1.2e-07, the resolution of float32" in caplog.text
    assert found["p_paired"].notna().any()
    mixed = perturbation_effects(table, n_permutations=0)
    assert not mixed["below_resolution"].any()
    null = perturbation_statistics(small, "vs_null", null=small.assign(value=small["value"] + 1e-10))
    assert null["below_resolution"].all()
    assert list(null.columns[:-1]) == list(perturbation_statistics(table, "vs_null", null=table.assign(value=table["value"] - 0.1)).columns)
    plot_volcano(
        found["effect"],
        found["fdr_paired"],
        found["Ensembl_ID"],
        tmp_path / "v.png",
        xlabel="x",
        ylabel="y",
        title="t",
        below_resolution=found["below_resolution"],
    )
    assert (tmp_path / "v.png").stat().st_size > 1000
