"""Gene medians: exact where they can be, within 0.1 % elsewhere, the same whoever computes them."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from transformers import AutoTokenizer

from geneformer_hf import GeneTable, fit_gene_table
from geneformer_hf.cli.main import main
from geneformer_hf.data import medians, sketches
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError, GeneIdError, SettingError
from geneformer_hf.gene_ids import human_genes
from geneformer_hf.outputs import unfinished
from tests import reference
from tests.conftest import ensembl, make_cells, with_row, write
from tests.formats import files as formats
from tests.tolerances import MEDIAN, SINGLE_PRECISION


def exact(*many: anndata.AnnData) -> dict[str, float]:
    """The naive medians of several sets of cells, by gene."""
    names = sorted({name for cells in many for name in cells.var_names})
    rows = np.concatenate([cells[:, [n for n in names if n in cells.var_names]].to_df().reindex(columns=names, fill_value=0).to_numpy() for cells in many])
    totals = np.concatenate([np.asarray(cells.X.sum(1)).ravel() for cells in many])
    return {name: m for name, m in zip(names, reference.gene_medians(rows, totals), strict=True) if not np.isnan(m)}


def as_dict(table: GeneTable) -> dict[str, float]:
    return dict(zip(table.ensembl_ids, table.medians.tolist(), strict=True))


def test_medians_over_files_of_several_kinds(tmp_path, genes):
    first, second, third = make_cells(genes, 20, seed=1), make_cells(genes, 15, seed=2), make_cells(genes[:40], 30, seed=3)
    turned = second[:, ::-1].copy()
    paths = [write(first, tmp_path / "a.h5ad"), write(turned, tmp_path / "b.h5ad", "csc"), formats.write_tenx_folder(third, tmp_path / "c")]
    fitted = fit_gene_table(paths)
    assert fitted.ensembl_ids == tuple(genes)
    assert as_dict(fitted) == pytest.approx(exact(first, second, third), rel=SINGLE_PRECISION)
    assert fitted.token_ids.tolist() == list(range(4, 64))
    assert fitted.source == "medians of 65 cells"


@pytest.mark.parametrize("most_exact", [10, 200, 100_000])
@pytest.mark.parametrize("range_cells", [64, 10_000])
def test_ranges_and_digests_stay_near(most_exact, range_cells, tmp_path, genes, monkeypatch):
    monkeypatch.setattr(sketches, "MOST_EXACT", most_exact)
    monkeypatch.setattr(medians, "RANGE_CELLS", range_cells)
    monkeypatch.setattr(medians, "BUFFER_VALUES", 3000)
    monkeypatch.setattr(medians, "MERGED_GENES", 7)
    cells = make_cells(genes, 600)
    cells.X = sp.csr_matrix(np.round(cells.X.toarray() ** 1.7))
    fitted = as_dict(fit_gene_table(write(cells, tmp_path / "a.h5ad")))
    # 250 values a gene: each is a centroid of its own until several digests meet.
    assert fitted == pytest.approx(exact(cells), rel=SINGLE_PRECISION if most_exact > 600 else 5e-3)


def test_filtered_cells_and_undetected_genes_are_left_out(genes):
    cells = make_cells(genes, 6, filter_pass=[1, 1, 1, 0, 0, 0])
    cells.X = with_row(cells.X, 5, 50)
    kept = cells[:3].copy()
    del kept.obs["filter_pass"]
    a, b = fit_gene_table(cells, special_tokens=False), fit_gene_table(kept, special_tokens=False)
    assert as_dict(a) == as_dict(b)
    assert len(a) == int((kept.X.toarray().sum(0) > 0).sum())
    assert a.token_ids[0] == 2


def test_totals_in_obs_are_used_where_they_can_be_true(tmp_path, caplog):
    cells = make_cells([ensembl(1), ensembl(2)], 3, n_counts=[1000, 1000, 1000])
    cells.X = sp.csr_matrix(np.array([[1, 9], [2, 8], [3, 7]], dtype=np.float32))
    path = write(cells, tmp_path / "a.h5ad")
    assert fit_gene_table(cells).medians.tolist() == fit_gene_table(path).medians.tolist() == [20.0, 80.0]
    cells.obs["n_counts"] = [1000, 1000, 5]
    write(cells, path)
    assert fit_gene_table(cells).medians.tolist() == fit_gene_table(path).medians.tolist() == [2000.0, 8000.0]
    assert "obs['n_counts'] is below the counts of 1 cells and is not used" in caplog.text
    with pytest.raises(CellFileError, match=r"a\.h5ad: obs\['n_counts'\] is below the counts of 1 of 3 cells"):
        fit_gene_table(path, total_counts="n_counts")


def some_of(biotype: str, n: int) -> list[str]:
    return sorted(g for g, kind in human_genes().biotype_of.items() if kind == biotype)[:n]


def test_biotypes_of_human_genes_and_of_others(tmp_path):
    coding, mirna, lnc = some_of("protein_coding", 20), some_of("miRNA", 10), some_of("lncRNA", 15)
    cells = make_cells([*lnc, *coding, *mirna], 12)
    assert fit_gene_table(cells, biotypes=["protein_coding", "miRNA"]).ensembl_ids == tuple(sorted(coding + mirna))
    with pytest.raises(SettingError, match=r"No gene of the files is of the biotypes proteins\. Found: lncRNA, miRNA, protein_coding"):
        fit_gene_table(cells, biotypes=["proteins"])
    with pytest.raises(SettingError, match=r"of the biotypes protein-coding\. Found"):
        fit_gene_table(cells, biotypes=["miRNA", "protein-coding"])
    mouse = make_cells([f"ENSMUSG{i:011d}" for i in range(30)], 12)
    with pytest.raises(SettingError, match="biotypes of mouse genes are not packaged"):
        fit_gene_table(mouse, biotypes=["protein_coding"])
    kinds = {f"ENSMUSG{i:011d}": "protein_coding" if i % 2 else "lncRNA" for i in range(30)}
    assert len(fit_gene_table(mouse, biotypes=["protein_coding"], gene_biotypes=kinds)) == 15


def test_the_command_writes_a_table_and_a_tokenizer_of_any_species(tmp_path, capsys):
    names = [f"ENSMUSG{i:011d}" for i in range(30)]
    mouse = make_cells(names, 12)
    write(mouse, tmp_path / "a.h5ad")
    pd.DataFrame({"ensembl_id": names, "biotype": ["protein_coding"] * 20 + ["lncRNA"] * 10}).to_csv(tmp_path / "kinds.csv", index=False)
    command = ["medians", str(tmp_path / "a.h5ad"), "--output", str(tmp_path / "t.json"), "--tokenizer", str(tmp_path / "tok")]
    command += ["--biotypes", "protein_coding", "--gene-biotypes", str(tmp_path / "kinds.csv")]
    assert main(command) == 0
    assert "20 mouse genes, medians of 12 cells" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert tokenizer.gene_table.fingerprint == GeneTable.load(tmp_path / "t.json").fingerprint
    assert tokenizer(names[:2], is_split_into_words=True)["input_ids"] == [2, 4, 5, 3]
    assert as_dict(tokenizer.gene_table) == pytest.approx({k: v for k, v in exact(mouse).items() if k in names[:20]}, rel=SINGLE_PRECISION)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "kinds.csv", "t.json", "tok"]


def test_finished_sketches_are_not_made_again(tmp_path, genes, monkeypatch):
    monkeypatch.setattr(medians, "RANGE_CELLS", 10)
    paths = [write(make_cells(genes, 35, seed=i), tmp_path / f"{i}.h5ad", "csc" if i else "csr") for i in range(2)]
    expected = fit_gene_table(paths)
    original, done = medians.save_sketches, []

    def stopping(sketch, part):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(part.name)
        original(sketch, part)

    monkeypatch.setattr(medians, "save_sketches", stopping)
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "t.json") as work:
        fit_gene_table(paths, work=work)
    first, done[:] = list(done), []
    with unfinished(tmp_path / "t.json") as work:
        again = fit_gene_table(paths, work=work)
    assert len(first) == 5
    assert not set(first) & set(done)
    assert again.to_json() == expected.to_json()


def test_bad_files_are_skipped_where_that_is_asked_for(tmp_path, genes, caplog):
    good = write(make_cells(genes, 12), tmp_path / "a.h5ad")
    (tmp_path / "b.h5ad").write_text("no")
    with pytest.raises(CellFileError, match=r"b\.h5ad"):
        fit_gene_table(tmp_path)
    assert fit_gene_table(tmp_path, skip_bad_files=True).to_json() == fit_gene_table(good).to_json()
    assert "1 files were skipped" in caplog.text


def test_genes_that_nobody_knows(genes):
    with pytest.raises(GeneIdError, match="none of its genes"):
        fit_gene_table(make_cells([f"nothing{i}" for i in range(5)], 3))


@pytest.mark.shared
@pytest.mark.slow
def test_medians_of_all_real_cells_are_within_a_tenth_of_a_percent(shared):
    # Cells that two other files hold, transcripts per million, and another species.
    others = ("day2_day5", "tpm184", "mouse")
    paths = [p for p in sorted((shared / "data").glob("*/*.h5ad")) if not any(name in p.name for name in others)]
    fitted = as_dict(fit_gene_table(paths))
    values: dict[str, list[np.ndarray]] = {}
    for path in paths:
        source = open_cells(path)
        table = GeneTable(ids := medians.ensembl_ids_of(source), range(len(ids)), np.ones(len(ids)))
        slots = source.match_genes(table)
        counts = sp.vstack([b.counts_ng for b in source.iter_blocks()], format="csr")
        totals = np.concatenate([source.totals(b) for b in source.iter_blocks()])
        to_gene = sp.csr_array(
            (np.ones(slots.report.n_mapped), (np.flatnonzero(slots.token_of_column >= 0), slots.token_of_column[slots.token_of_column >= 0])),
            shape=(counts.shape[1], len(ids)),
        )
        scaled = (sp.diags_array(1e4 / totals) @ (counts @ to_gene)).tocsc()
        for i, name in enumerate(ids):
            if (column := scaled.data[scaled.indptr[i] : scaled.indptr[i + 1]]).size:
                values.setdefault(name, []).append(column[column > 0])
    expected = {name: float(np.median(np.concatenate(parts))) for name, parts in values.items()}
    assert set(fitted) == set(expected)
    assert len(fitted) > 30_000
    assert fitted == pytest.approx(expected, rel=MEDIAN)
