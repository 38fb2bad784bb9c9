"""Which cells pass: each rule by hand, whoever measures; nothing is dropped and nothing of the user's is lost."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp

from geneformer_hf import QualityRules, assess_quality
from geneformer_hf.cli.main import main
from geneformer_hf.data import doublets, encoder
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, SettingError
from geneformer_hf.gene_ids import human_genes
from tests.conftest import write
from tests.formats import files as formats

QUICK = QualityRules(doublets=False)


def human(biotype: str, n: int) -> list[str]:
    genes = human_genes()
    return sorted(g for g, kind in genes.biotype_of.items() if kind == biotype and not genes.symbol_of.get(g, "").startswith("MT-"))[:n]


@pytest.fixture(scope="module")
def genes() -> list[str]:
    mitochondrial = sorted(g for g, s in human_genes().symbol_of.items() if s.startswith("MT-CO"))
    return [*mitochondrial, *human("protein_coding", 30), *human("miRNA", 10), *human("lncRNA", 17)]


@pytest.fixture
def cells(genes) -> anndata.AnnData:
    """Two hundred ordinary cells and a few that are not."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(5, (200, len(genes))).astype(np.float32)
    counts[10] *= 40
    counts[11, :3] += 400
    counts[12, 3:] = 0
    counts[12, 43:] = 5
    counts[13, 9:43] = 0
    obs = pd.DataFrame({"sample": np.repeat(["s1", "s2"], 100), "n": np.arange(200)}, index=[f"cell{i}" for i in range(200)])
    obs["malignant"] = False
    obs.loc["cell20", "malignant"] = True
    obs["disease"] = pd.Categorical(["normal"] * 199 + ["leukaemia"])
    return anndata.AnnData(sp.csr_matrix(counts), obs, pd.DataFrame(index=genes))


def by_hand(cells: anndata.AnnData, genes: list[str], excluded: np.ndarray) -> list[str]:
    x = cells.X.toarray().astype(np.float64)
    totals, share, detected = x.sum(1), x[:, :3].sum(1) / x.sum(1), (x[:, :43] > 0).sum(1)
    eligible = (detected >= 7) & ~excluded
    reasons = []
    for i in range(len(x)):
        found = ["few genes"] if detected[i] < 7 else []
        for values, what in ((totals, "counts"), (share, "mitochondrial share")):
            mean, sd = values[eligible].mean(), values[eligible].std()
            if detected[i] >= 7:
                found += [f"low {what}"] * int(values[i] < mean - 3 * sd) + [f"high {what}"] * int(values[i] > mean + 3 * sd)
        reasons.append("; ".join(found))
    return reasons


def test_every_rule_by_hand(cells, genes, tmp_path):
    expected = by_hand(cells, genes, np.zeros(200, dtype=bool))
    found = assess_quality(write(cells, tmp_path / "a.h5ad"), rules=QUICK).cells()
    assert found["filter_reason"].tolist() == expected
    assert found["filter_pass"].tolist() == [r == "" for r in expected]
    assert found.index.tolist() == cells.obs_names.tolist()
    assert expected[10] == "high counts"
    assert expected[11] == "high mitochondrial share"
    assert expected[12] == "few genes", "lncRNA does not count"
    assert expected[13] == "", "nine coding genes are enough"
    assert np.allclose(found["qc_total_counts"], cells.X.toarray().sum(1))


@pytest.mark.parametrize("kind", ["csc", "dense", "loom", "tenx", "memory"])
def test_every_kind_of_file_gets_the_same_verdict(kind, cells, genes, tmp_path):
    make = {
        "csc": lambda: write(cells, tmp_path / "a.h5ad", "csc"),
        "dense": lambda: write(cells, tmp_path / "a.h5ad", "dense"),
        "loom": lambda: formats.write_loom(cells, tmp_path / "a.loom"),
        "tenx": lambda: formats.write_tenx_folder(cells, tmp_path / "a", shuffled=True),
        "memory": lambda: cells,
    }
    assert assess_quality(make[kind](), rules=QUICK).cells()["filter_reason"].tolist() == by_hand(cells, genes, np.zeros(200, dtype=bool))


def test_columns_that_mark_cells(cells, genes):
    rules = QualityRules(exclude=(("malignant", ()), ("disease", ("leukaemia", "glioma"))), doublets=False)
    reasons = assess_quality(cells, rules=rules).cells()["filter_reason"]
    assert reasons["cell20"] == "excluded by malignant"
    assert reasons["cell199"] == "excluded by disease"
    marked = np.isin(np.arange(200), (20, 199))
    assert reasons[~marked].tolist() == np.array(by_hand(cells, genes, marked), dtype=object)[~marked].tolist()
    with pytest.raises(ColumnNotFoundError, match="obs has no column 'tumour'"):
        assess_quality(cells, rules=QualityRules(exclude=(("tumour", ()),), doublets=False))


def test_bounds_are_of_each_dataset_across_files_and_ranges(cells, genes, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "RANGE_CELLS", 32)
    halves = [cells[:100].copy(), cells[100:].copy()]
    paths = [write(half, tmp_path / f"{i}.h5ad") for i, half in enumerate(halves)]
    alone = assess_quality(paths, rules=QUICK)
    assert alone.summary["cells"].tolist() == [100, 100]
    for path, half in zip(paths, halves, strict=True):
        assert alone.cells(str(path))["filter_reason"].tolist() == by_hand(half, genes, np.zeros(100, dtype=bool))
    named = assess_quality(write(cells, tmp_path / "both.h5ad"), rules=QualityRules(dataset="sample", doublets=False))
    assert named.cells()["filter_reason"].tolist() == [r for p in paths for r in alone.cells(str(p))["filter_reason"]]
    assert named.summary.index.tolist() == ["s1", "s2"]
    assert named.summary.loc["s1", "total_counts_mean"] == pytest.approx(alone.summary["total_counts_mean"].iloc[0])


def test_the_summary_counts(cells):
    quality = assess_quality(cells, rules=QUICK)
    frame, row = quality.cells(), quality.summary.iloc[0]
    assert (row["cells"], row["passing"]) == (200, int(frame["filter_pass"].sum()))
    for reason in ("few genes", "high counts", "high mitochondrial share"):
        assert row[reason] == frame["filter_reason"].str.contains(reason).sum()


def test_a_filter_that_was_there_stays_in_force(cells):
    cells.obs["filter_pass"] = np.arange(200) != 7
    found = assess_quality(cells, rules=QUICK).cells()
    assert found.loc["cell7", "filter_reason"] == "filter_pass was 0"
    assert found["filter_pass"].sum() < 200


def test_other_species(cells, caplog):
    mouse = cells.copy()
    mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(cells.n_vars)]
    mouse.var["gene_symbol"] = ["mt-Co1", "mt-Co2", "mt-Co3", *[f"Gene{i}" for i in range(cells.n_vars - 3)]]
    found = assess_quality(mouse, rules=QUICK).cells()
    assert found["qc_mitochondrial_share"].tolist() == assess_quality(cells, rules=QUICK).cells()["qc_mitochondrial_share"].tolist()
    assert found["qc_coding_genes"].tolist() == (mouse.X.toarray() > 0).sum(1).tolist()
    assert "biotypes of its genes are not known" in caplog.text
    kinds = dict.fromkeys(mouse.var_names[:43], "protein_coding")
    assert (
        assess_quality(mouse, rules=QUICK, gene_biotypes=kinds).cells()["filter_reason"].tolist()
        == assess_quality(cells, rules=QUICK).cells()["filter_reason"].tolist()
    )
    del mouse.var["gene_symbol"]
    caplog.clear()
    assert assess_quality(mouse, rules=QUICK).cells()["qc_mitochondrial_share"].isna().all()
    assert "no gene is known to be mitochondrial" in caplog.text


@pytest.fixture(scope="module")
def mixture(genes) -> anndata.AnnData:
    """Two kinds of cells, and a few droplets that hold one of each."""
    rng = np.random.default_rng(1)
    names = [*genes, *human("protein_coding", 1000)[30:]]
    profiles = rng.lognormal(0, 0.5, len(names)) * np.where(rng.random((2, len(names))) < 0.3, 8, 1)
    profiles /= profiles.sum(1, keepdims=True)
    counts = rng.poisson(profiles[rng.integers(0, 2, 300)] * rng.normal(4000, 400, (300, 1)))
    counts[:15] = rng.poisson(profiles.sum(0) * 4000, (15, len(names)))
    obs = pd.DataFrame({"sample": ["a"] * 300}, index=[f"c{i}" for i in range(300)])
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=names))


def test_scores_are_those_of_the_library_and_decide(mixture):
    found = assess_quality(mixture, rules=QualityRules(max_doublet_score=0.15, n_sd=100)).cells()
    theirs = mixture.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scanpy.pp.scrublet(theirs, use_approx_neighbors=False, random_state=0, verbose=False)
    assert found["qc_doublet_score"].tolist() == theirs.obs["doublet_score"].astype(np.float32).tolist()
    assert (found["filter_reason"] == "doublet").tolist() == (found["qc_doublet_score"] > np.float32(0.15)).tolist()
    assert 0 < (found["filter_reason"] == "doublet").sum() < 150


@pytest.mark.shared
def test_real_doublets_score_high(shared):
    """A hundred sums of a B cell and a monocyte among real blood cells."""
    cells = anndata.read_h5ad(shared / "data/pbmc3k/pbmc3k_raw_annotated.h5ad")
    rng, kind = np.random.default_rng(0), cells.obs["cell_type"].astype(str)
    one, other = (rng.choice(np.flatnonzero(kind.str.contains(name)), 100) for name in ("^B", "CD14"))
    both = anndata.AnnData(sp.csr_matrix(cells.X[one] + cells.X[other]), pd.DataFrame(index=[f"both{i}" for i in range(100)]), cells.var)
    found = assess_quality(anndata.concat([cells, both]), rules=QualityRules(n_sd=100)).cells()
    scores = found["qc_doublet_score"]
    # Area under the ROC curve: the chance that one of both scores above a single cell; 0.5 where scores belong to other cells.
    area = (scores.rank()[-100:].sum() - 100 * 101 / 2) / (100 * cells.n_obs)
    assert area > 0.75


def test_doublets_form_within_a_sample(mixture):
    both = anndata.concat([mixture, mixture[:50]], keys=["x", "y"], index_unique="-")
    both.obs["sample"] = ["a"] * 300 + ["b"] * 50
    shuffled = both[np.random.default_rng(0).permutation(350)].copy()
    scores = assess_quality(shuffled, rules=QualityRules(sample="sample")).cells()["qc_doublet_score"]
    assert scores[shuffled.obs["sample"] == "b"].isna().all(), "fewer than 100 cells"
    assert scores[shuffled.obs["sample"] == "a"].notna().all()


def test_a_sample_too_large_to_be_held(mixture, monkeypatch):
    monkeypatch.setattr(doublets, "MOST_CELLS", 250)
    with pytest.raises(SettingError, match=r"300 cells as one sample; .*--sample COL"):
        assess_quality(mixture)


def test_the_command_marks_a_copy(cells, tmp_path, capsys):
    cells.uns["mine"], cells.obs["filter_pass"] = np.arange(3), 1
    path = write(cells, tmp_path / "a.h5ad")
    before = path.read_bytes()
    assert main(["qc", str(path), "--output", str(tmp_path / "out.h5ad"), "--no-doublets", "--exclude", "malignant", "disease=leukaemia"]) == 0
    assert "of 200 cells pass (failing, some for several reasons: excluded 2, few genes 1," in capsys.readouterr().out
    assert path.read_bytes() == before
    marked = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.array_equal(marked.X.toarray(), cells.X.toarray())
    assert marked.uns["mine"].tolist() == [0, 1, 2]
    assert marked.obs["filter_reason"]["cell20"] == "excluded by malignant"
    assert marked.obs["filter_pass_before"].all()
    assert list(marked.obs.columns[:5]) == ["sample", "n", "malignant", "disease", "filter_pass"]
    summary = pd.read_csv(tmp_path / "out_qc.csv")
    assert summary["passing"].item() == int(marked.obs["filter_pass"].sum())
    assert (tmp_path / "out_qc.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "out.h5ad", "out_qc.csv", "out_qc.png"]
    assert assess_quality(tmp_path / "out.h5ad", rules=QUICK).cells()["filter_reason"]["cell20"].startswith("filter_pass was 0")


def test_the_command_makes_h5ad_of_other_kinds_and_tables(cells, genes, tmp_path, capsys):
    loom, tenx = formats.write_loom(cells, tmp_path / "a.loom"), formats.write_tenx_h5(cells, tmp_path / "b.h5", antibodies=2)
    assert main(["qc", str(loom), str(tenx), "--output", str(tmp_path / "out"), "--no-doublets"]) == 0
    assert "a.loom is no .h5ad: the output holds its counts, obs and genes, and nothing else of it." in capsys.readouterr().out
    expected = by_hand(cells, genes, np.zeros(200, dtype=bool))
    for name in ("a", "b"):
        made = anndata.read_h5ad(tmp_path / "out" / f"{name}.h5ad")
        assert np.array_equal(made.X.toarray(), cells.X.toarray())
        assert made.obs_names.tolist() == cells.obs_names.tolist()
        assert made.var["ensembl_id"].tolist() == genes
        assert made.obs["filter_reason"].astype(str).tolist() == expected
    assert anndata.read_h5ad(tmp_path / "out" / "a.h5ad").obs["sample"].tolist() == cells.obs["sample"].tolist()
    assert main(["qc", str(loom), "--output", str(tmp_path / "cells.csv"), "--no-doublets"]) == 0
    assert pd.read_csv(tmp_path / "cells.csv", keep_default_na=False)["filter_reason"].tolist() == expected


def test_what_cannot_be_judged(cells, tmp_path, capsys):
    empty = write(cells[:0].copy(), tmp_path / "empty.h5ad")
    with pytest.raises(CellFileError, match="there are no cells to judge"):
        assess_quality(empty, rules=QUICK)
    with pytest.raises(SettingError, match="n_sd is 0"):
        QualityRules(n_sd=0)
    a, b = write(cells, tmp_path / "a.h5ad"), write(cells, tmp_path / "b.h5ad")
    assert main(["qc", str(a), str(b), "--output", str(tmp_path / "out.h5ad")]) == 1
    assert "2 inputs need a folder" in capsys.readouterr().err
    assert main(["qc", str(a), "--output", str(tmp_path / "out.h5ad"), "--dataset", "study"]) == 1
    assert "obs has no column 'study'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "empty.h5ad"]
