"""The commands perturb and stats, as they are typed."""

import pickle

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from geneformer_hf.cli.main import main
from tests.conftest import ensembl, make_cells


@pytest.fixture
def folder(genes, model_folder, tmp_path):
    cells = make_cells(genes, 12)
    cells.obs["cell_type"], cells.obs["donor"] = ["a", "b"] * 6, [f"d{i // 4}" for i in range(12)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model_folder.rename(tmp_path / "model")
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    def go(*words, code=0):
        assert main([str(word).replace("@", f"{folder}/") for word in words]) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return go


PERTURB = ("perturb", "@cells.h5ad", "--model", "@model", "--kind")


def test_the_plan_alone(run, folder):
    printed = run(*PERTURB, "delete", "--genes", "all", "--plan-only")
    assert "12 cells of" in printed
    assert "variants to run" in printed
    assert not list(folder.glob("*.parquet"))


def test_pairs_and_their_statistics(run, folder, genes):
    (folder / "genes.txt").write_text("# of interest\n" + "\n".join(genes[:3]) + "\n")
    printed = run(*PERTURB, "delete", "--genes", "@genes.txt", "--pairs", "--output", "@pairs.parquet")
    assert "--mode cooperativity" in printed
    assert {len(g) for g in pq.read_table(folder / "pairs.parquet")["genes"].to_pylist()} <= {1, 2}
    run("stats", "@pairs.parquet", "--mode", "cooperativity", "--model", "@model", "--output", "@pairs.csv", "--plot", "@pairs.png")
    found = pd.read_csv(folder / "pairs.csv")
    assert {"excess", "Gene_name_1"} <= set(found.columns)
    assert (folder / "pairs.png").stat().st_size > 5000


def test_screening(run, folder, caplog):
    screen = ("--screen", "--top", "3", "--judged", "2", "--output", "@screened.parquet")
    printed = run(*PERTURB, "delete", "--genes", "all", *screen)
    assert "genes estimated" in printed
    assert "Screening: estimates against exact values of all genes of 2 cells: rank correlation" in printed
    assert "of the exact top 3" in printed
    assert "--mode effects --readout estimated_cell" in printed
    statistics = ("stats", "@screened.parquet", "--mode", "effects", "--permutations", "0")
    run(*statistics, "--readout", "estimated_cell", "--output", "@estimated.csv")
    assert "of a screening" not in caplog.text
    run(*statistics, "--output", "@exact.csv")
    assert "The table is of a screening" in caplog.text


def test_towards_a_state_with_donors(run, folder):
    run(*PERTURB, "overexpress", "--genes", "all", "--state-column", "cell_type", "--start", "a", "--goal", "b", "--output", "@out.parquet")
    donors = ("--donors", "@cells.h5ad", "--donor-column", "donor")
    run("stats", "@out.parquet", "--mode", "goal_state_shift", *donors, "--leave-out-tested", "--output", "@shifts.csv", "--plot", "@shifts.png")
    assert pd.read_csv(folder / "shifts.csv")["N_Detections"].max() <= 3
    run(
        "stats",
        "@out.parquet",
        "--mode",
        "effects",
        "--readout",
        "state",
        "--target",
        "b",
        "--permutations",
        "50",
        "--output",
        "@effects.csv",
        "--plot",
        "@effects.png",
    )
    assert {"effect", "fdr_permutation"} <= set(pd.read_csv(folder / "effects.csv").columns)


def test_every_gene_on_every_other_gene(run, folder, genes):
    run(*PERTURB, "delete", "--genes", ",".join(genes[:4]), "--readout", "gene", "--output", "@out.parquet")
    run("stats", "@out.parquet", "--mode", "aggregate_gene_shifts", "--model", "@model", "--output", "@genes.csv", "--plot", "@genes.png")
    assert (folder / "genes.png").stat().st_size > 5000


def test_raw_values_of_the_published_package(run, folder):
    raw = folder / "raw"
    raw.mkdir()
    for cell in range(6):
        values = {(4 + gene, "cell_emb"): [0.9 - 0.3 * (gene == 2) + 0.01 * cell] for gene in range(5)}
        (raw / f"in_silico_delete_x_dict_cell_embs_{cell}batch-1_raw.pickle").write_bytes(pickle.dumps(values))
    run("stats", "@raw", "--model", "@model", "--mode", "mixture_model", "--order-components", "--output", "@old.csv", "--plot", "@old.png")
    found = pd.read_csv(folder / "old.csv")
    assert found.loc[0, ["Ensembl_ID", "Impact_component"]].tolist() == [ensembl(3), 1]
    assert np.isclose(found.loc[0, "Test_avg_shift"], 0.625)
    assert "whose genes are tokens. Pass --model" in run("stats", "@raw", "--mode", "mixture_model", "--output", "@other.csv", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PERTURB, "delete", "--genes", "all"), "--output is missing; give a new .parquet file, or --plan-only"),
        ((*PERTURB, "delete", "--genes", "all", "--output", "@x.csv"), "expected a name that ends in .parquet"),
        ((*PERTURB, "delete", "--genes", "all", "--pairs", "--output", "@x.parquet"), "--genes all changes each gene of a cell by itself"),
        ((*PERTURB, "delete", "--genes", "missing.txt", "--output", "@x.parquet"), "--genes missing.txt does not exist"),
        ((*PERTURB, "delete", "--genes", ",", "--output", "@x.parquet"), "there are no genes in it"),
        ((*PERTURB, "delete", "--genes", "NOGENE", "--output", "@x.parquet"), "NOGENE"),
        ((*PERTURB, "delete", "--genes", "all", "--goal", "b", "--output", "@x.parquet"), "--state-column, --start missing"),
        ((*PERTURB, "delete", "--genes", "all", "--rank", "3", "--output", "@x.parquet"), "quartiles and rank are for inhibit and activate"),
        ((*PERTURB, "delete", "--genes", "all", "--top", "3", "--output", "@x.parquet"), "--top, --judged and --anchors are settings of a screening"),
        ((*PERTURB, "delete", "--genes", "A,B", "--screen", "--output", "@x.parquet"), "--screen looks for genes among all those of a cell"),
        ((*PERTURB, "delete", "--genes", "all", "--screen", "--rank", "3", "--output", "@x.parquet"), "--rank and --quartiles shift genes"),
        ((*PERTURB, "inhibit", "--genes", "all", "--screen", "--output", "@x.parquet"), "estimates are for delete and overexpress"),
        ((*PERTURB, "delete", "--genes", "all", "--readout", "probability", "--output", "@x.parquet"), "needs a model fine-tuned for classes of cells"),
        (("stats", "@cells.h5ad", "--mode", "effects", "--output", "@x.csv"), "cannot be read as a table of perturbations"),
        (("stats", "@none.parquet", "--mode", "effects", "--output", "@x.csv"), "does not exist"),
        (("stats", "@none.parquet", "--mode", "effects", "--output", "@x.txt"), "expected a name that ends in .csv"),
    ],
)
def test_what_cannot_be_done_is_said(run, folder, words, message):
    assert message in run(*words, code=1)
    assert not [path for path in folder.iterdir() if path.name.startswith(("x.", ".x."))]


def test_other_donors_are_refused(run, folder):
    run(*PERTURB, "delete", "--genes", "all", "--output", "@out.parquet")
    (folder / "donors.csv").write_text("cell,who\nc,d\n")
    stats = ("stats", "@out.parquet", "--mode", "effects", "--output", "@x.csv", "--donors")
    assert "expected the columns cell_id and donor, and it has cell, who" in run(*stats, "@donors.csv", code=1)
    assert "--donor-column says which column holds the donors" in run(*stats, "@cells.h5ad", code=1)
