"""Which columns of a file are genes and what names them: types of features, ids anywhere, genomes, gaps, renamed symbols."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf import GeneformerTokenizer, GeneTable, embed_cells, load_cells, stream_cells
from geneformer_hf.cli.main import main
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import GeneIdError
from geneformer_hf.feature_types import feature_types, kind_of_feature
from geneformer_hf.gene_ids import GeneFeatures, id_inside, looks_like_a_date
from tests.conftest import make_cells, random_counts, write

TP53, GAPDH, SEPTIN2, HLA_A, MT_CO1 = "ENSG00000141510", "ENSG00000111640", "ENSG00000168385", "ENSG00000206503", "ENSG00000198804"
MOUSE = [f"ENSMUSG{i:011d}" for i in range(1, 61)]


def tokens_of(cells, tokenizer, **options):
    return [list(cell) for cell in tokenizer(cells, **options)["input_ids"]]


def dataset_of(cells, tokenizer, tmp_path, **options):
    """The same cells through a file, checked against AnnData in memory and against a stream."""
    write(cells, tmp_path / "cells.h5ad")
    found = load_cells(tmp_path / "cells.h5ad", tokenizer=tokenizer, cache_dir=tmp_path / "cache", **options)
    memory = load_cells(cells, tokenizer=tokenizer, **options)
    streamed = list(stream_cells(tmp_path / "cells.h5ad", tokenizer=tokenizer, obs="none", **options))
    assert found["input_ids"][:] == memory["input_ids"][:] == [row["input_ids"].tolist() for row in streamed]
    assert [cell for cell in tokens_of(cells, tokenizer, **options) if len(cell) > 2] == found["input_ids"][:]
    return found


def with_features(cells, names, counts, **columns):
    """Append features that are not genes; columns of var are given for all."""
    x = sp.hstack([cells.X, sp.csr_matrix(np.full((cells.n_obs, len(names)), counts, dtype=np.float32))], format="csr")
    var = pd.DataFrame(columns, index=[*cells.var_names, *names])
    return anndata.AnnData(x, cells.obs.copy(), var)


OTHER = ["Antibody Capture", "ADT", "adt", "AB", "ab", "Protein", "protein", "prot", "antibody", "Antibodies", "CRISPR Guide Capture", "guides", "sgRNA", "Peaks", "ATAC", "HTO",
         "Multiplexing Capture", "Custom", "hashtag", "CITE-seq", "cell_hashing", "Negative Control Probe", "Antigen Capture"]  # fmt: skip
RNA = [
    "Gene Expression",
    "gene expression",
    "GEX",
    "gex",
    "RNA",
    "rna",
    "Gene",
    "gene",
    "mRNA",
    "Gene Expression\tchr1",
    "protein_coding",
    "lncRNA",
    "Gene-Expression",
    "scRNA",
]


@pytest.mark.parametrize("name", OTHER)
def test_types_of_other_features(name):
    assert kind_of_feature(name) == "other"


@pytest.mark.parametrize("name", RNA)
def test_types_of_genes(name):
    assert kind_of_feature(name) == "gene"


@pytest.mark.parametrize(
    "column",
    ["feature_types", "feature_type", "feature_types-0", "Feature Type", "featureType", "modality", "Modality", "feature_types_x", "feature_types-1-0", "kind"],
)
@pytest.mark.parametrize("other", ["Antibody Capture", "prot", "ADT"])
def test_only_rna_is_ranked_through_every_door(column, other, genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    # Antibodies named as genes: their counts must not be added to the genes'.
    mixed = with_features(cells, ["SYM0", "SYM1", "SYM2"], 1000, **{column: ["Gene Expression"] * 60 + [other] * 3})
    found = dataset_of(mixed, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    report = json.loads(found.info.description)["files"][0]
    assert f"3 features that are not genes left out, by var['{column}'] ({other} 3)" in report["genes"]
    assert report["gene_names"]["notes"] == [f"3 features that are not genes left out, by var['{column}'] ({other} 3)"]


def test_unknown_types_are_named_and_left_out(genes, tokenizer, tmp_path, caplog):
    mixed = with_features(make_cells(genes, 12), ["SYM0"], 1000, feature_types=["Gene Expression"] * 60 + ["Surfaceome"])
    assert dataset_of(mixed, tokenizer, tmp_path)["input_ids"][:] == tokens_of(make_cells(genes, 12), tokenizer)
    assert "features of unknown types are left out, by var['feature_types']: Surfaceome (1)" in caplog.text


def test_genes_without_a_type_are_kept(genes, tokenizer, tmp_path):
    mixed = with_features(make_cells(genes, 12), ["SYM0"], 1000, **{"feature_types-0": ["Gene Expression"] * 30 + [None] * 30 + ["ADT"]})
    assert dataset_of(mixed, tokenizer, tmp_path)["input_ids"][:] == tokens_of(make_cells(genes, 12), tokenizer)


def test_the_first_column_with_a_value_decides():
    found = feature_types({"feature_types-0": ["RNA", "nan", "ADT"], "feature_types-1": ["nan", "prot", "RNA"]}, 3)
    assert found.is_gene.tolist() == [True, False, False]


def test_a_feature_is_no_gene_if_any_column_of_types_says_so(genes, tokenizer, tmp_path):
    mixed = with_features(
        make_cells(genes, 12), ["SYM0"], 1000, feature_types=["Gene Expression"] * 61, modality=["rna"] * 60 + ["prot"]
    )  # fmt: skip
    assert dataset_of(mixed, tokenizer, tmp_path)["input_ids"][:] == tokens_of(make_cells(genes, 12), tokenizer)


def test_features_without_a_type_are_counted(genes):
    mixed = with_features(make_cells(genes, 12), ["SYM0"], 1000, feature_types=["Gene Expression"] * 50 + [None] * 10 + ["ADT"])
    assert (
        open_cells(mixed).features.types.describe()
        == "1 features that are not genes left out, by var['feature_types'] (ADT 1), and 10 without a type taken for genes"
    )


def test_biotypes_are_genes_and_prose_is_no_column_of_types(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    cells.var["feature_type"] = ["protein_coding", "lncRNA", "IG_V_gene"] * 20
    cells.var["panel"] = ["protein", "control"] * 30
    assert dataset_of(cells, tokenizer, tmp_path)["input_ids"][:] == tokens_of(make_cells(genes, 12), tokenizer)


def test_a_file_of_nothing_but_other_features_is_refused(genes, model_folder, tmp_path, capsys, model, tokenizer):
    cells = make_cells(genes, 6)
    cells.var["feature_types"] = "Antibody Capture"
    path = write(cells, tmp_path / "cells.h5ad")
    for door in (lambda: tokenizer(cells), lambda: load_cells(path, tokenizer=tokenizer), lambda: embed_cells(model, cells, tokenizer=tokenizer)):
        with pytest.raises(GeneIdError, match=r"none of its 60 features is a gene, by var\['feature_types'\] \(Antibody Capture\)"):
            door()
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 1
    assert "none of its 60 features is a gene" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(
    "template",
    ["hg38_1,{id},{symbol}", "{symbol}_{id}", "{id}-{symbol}", "{id}:{symbol}", "{symbol}|{id}.7", "{id}|{symbol}|x", "gene:{id}", "{id}.3_{symbol}"],
)
def test_ids_inside_names_are_found(template, genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [template.format(id=gene, symbol=f"X{i}") for i, gene in enumerate(genes)]
    found = dataset_of(cells, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    assert "60 Ensembl ids found inside longer names" in json.loads(found.info.description)["files"][0]["genes"]


def test_a_name_with_two_ids_is_no_id():
    assert id_inside(f"{TP53}_{GAPDH}") is None
    assert id_inside(f"{TP53}_{TP53}.4") == f"{TP53}.4" or id_inside(f"{TP53}_{TP53}.4") == TP53
    assert id_inside("XENSG00000141510") is None


@pytest.mark.parametrize("column", ["gene_id", "GeneID", "EnsemblID", "stable id", "id"])
@pytest.mark.parametrize("kind", ["text", "category"])
def test_any_column_of_ids_is_preferred_to_symbols(column, kind, genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    # These symbols lead to other genes of the vocabulary.
    cells.var_names = [f"SYM{59 - i}" for i in range(60)]
    cells.var[column] = pd.Categorical(genes) if kind == "category" else genes
    found = dataset_of(cells, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    assert json.loads(found.info.description)["files"][0]["gene_names"]["source"] == f"var[{column!r}]"


def test_the_column_with_most_ids_of_the_vocabulary_wins(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    # Mouse ids in all rows of the first, human orthologues in all but one of the other.
    cells.var_names = MOUSE
    cells.var["human"] = [*genes[:59], "none"]
    found = dataset_of(cells, tokenizer, tmp_path)
    assert json.loads(found.info.description)["files"][0]["gene_names"]["source"] == "var['human']"
    lost = tokenizer.gene_table.token_of([genes[59]])[0]
    assert found["input_ids"][:] == [[token for token in cell if token != lost] for cell in expected]


@pytest.mark.parametrize("gap", [np.nan, None, "", "nan", "None", "<NA>", "NA", "-"])
def test_gaps_are_filled_row_by_row_from_symbols(gap, genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [f"SYM{i}" for i in range(60)]
    cells.var["ensembl_id"] = [gap if i % 5 == 0 else gene for i, gene in enumerate(genes)]
    found = dataset_of(cells, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    report = json.loads(found.info.description)["files"][0]["gene_names"]
    assert (report["n_filled"], report["n_mapped"], report["unknown"]) == (12, 60, [])


def test_gaps_in_a_column_that_the_user_names_are_filled_too(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [f"SYM{i}" for i in range(60)]
    cells.var["mine"] = [None if i < 7 else gene for i, gene in enumerate(genes)]
    assert dataset_of(cells, tokenizer, tmp_path, gene_ids="mine")["input_ids"][:] == expected


def test_any_column_of_symbols_fills_the_gaps(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [str(i) for i in range(60)]
    cells.var["Approved symbol"] = [f"SYM{i}" if i % 10 == 0 else "" for i in range(60)]
    cells.var["original_gene_symbols"] = [f"SYM{i}" for i in range(60)]
    cells.var["ensembl_id"] = [None if i % 5 == 0 else gene for i, gene in enumerate(genes)]
    assert dataset_of(cells, tokenizer, tmp_path)["input_ids"][:] == expected


def test_a_few_ids_do_not_outweigh_the_symbols_of_all_genes(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [f"SYM{i}" for i in range(60)]
    # The nearest gene of some features, say.
    cells.var["note"] = [gene if i < 5 else "" for i, gene in enumerate(reversed(genes))]
    found = dataset_of(cells, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    assert json.loads(found.info.description)["files"][0]["gene_names"]["source"] == "symbols in the index of var"


def test_ids_that_contradict_the_symbols_are_not_used_without_a_word(caplog):
    named = GeneFeatures({"nearest": [GAPDH, SEPTIN2, TP53]}, ["TP53", "GAPDH", "SEPTIN2"]).named()
    assert (named.names, named.source) == (["TP53", "GAPDH", "SEPTIN2"], "symbols in the index of var")
    assert "var['nearest'] holds Ensembl ids of other genes than the symbols of the file, and is not used" in caplog.text
    assert GeneFeatures({"nearest": [GAPDH, SEPTIN2, TP53]}, ["TP53", "GAPDH", "SEPTIN2"], gene_ids="nearest").named().names == [GAPDH, SEPTIN2, TP53]


def human_table() -> GeneTable:
    return GeneTable([TP53, GAPDH, SEPTIN2, HLA_A, MT_CO1], range(4, 9), np.ones(5), ["TP53", "GAPDH", "SEPTIN2", "HLA-A", "MT-CO1"])


@pytest.mark.parametrize(
    ("name", "gene"), [("SEPT2", SEPTIN2), ("NEDD5", SEPTIN2), ("SEPTIN2", SEPTIN2), ("HLA.A", HLA_A), ("HLA-A", HLA_A), ("MT.CO1", MT_CO1), ("TP53", TP53)]
)
def test_renamed_symbols_and_dots_of_r(name, gene):
    assert human_table().token_of([name]) == human_table().token_of([gene])


def test_an_exact_match_comes_before_any_repair():
    table = GeneTable([TP53, GAPDH], [4, 5], [1.0, 1.0], ["A-B", "A.B"])
    assert table.token_of(["A.B", "A-B"]).tolist() == [5, 4]


def test_dots_are_counted_and_dates_are_reported_and_never_guessed():
    report = human_table().resolve(["TP53", "HLA.A", "2-Sep", "1-Mar", "2021-09-02"], source="index").report
    assert (report.n_dotted, report.n_mapped) == (1, 2)
    assert "1 symbols with dots for dashes, as R writes them" in report.describe()
    assert "3 of these are dates (2-Sep, 1-Mar, 2021-09-02), which a spreadsheet makes of symbols" in report.describe()


@pytest.mark.parametrize(("name", "date"), [("2-Sep", True), ("Mar-01", True), ("01-Dec", True), ("2021-03-01 00:00:00", True), ("9/2/2021", True), ("SEPT2", False), ("MARCH1", False),
                                            ("DEC1", False), ("RP11-34P13.7", False), ("7SK", False), ("5S_rRNA", False)])  # fmt: skip
def test_dates(name, date):
    assert looks_like_a_date(name) is date


def mixture(genes, style="hg19_{}|mm10_{}", where="both", n_mouse=4):
    """12 cells of 60 human and 60 mouse genes; the last ones are mouse cells with a little ambient human RNA."""
    human, mouse = random_counts(12, 60, 1), random_counts(12, 60, 2)
    scale = np.where(np.arange(12) < 12 - n_mouse, 1.0, 0.0)
    human, mouse = human.multiply((1 + 19 * scale)[:, None]), mouse.multiply((1 + 19 * (1 - scale))[:, None])
    x = sp.csr_matrix(sp.hstack([human, mouse]), dtype=np.float32)
    ours, theirs = style.split("|")
    names, symbols = (
        [ours.format(g) for g in genes] + [theirs.format(g) for g in MOUSE],
        [ours.format(f"SYM{i}") for i in range(60)] + [theirs.format(f"Sym{i}") for i in range(60)],
    )
    var = {"both": pd.DataFrame({"gene_ids": names}, index=symbols), "ids": pd.DataFrame(index=names), "symbols": pd.DataFrame(index=symbols)}[where]
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(12)])
    return anndata.AnnData(x, obs, var), anndata.AnnData(sp.csr_matrix(human, dtype=np.float32), obs.copy(), pd.DataFrame(index=genes))


STYLES = ["hg19_{}|mm10_{}", "GRCh38_{}|GRCm39_{}", "GRCh38______{}|mm10___{}", "human-{}|mouse-{}", "GRCh38-2020-A_{}|mm10-2020-A_{}"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where", ["both", "ids", "symbols"])
def test_a_mixture_of_genomes_is_read_by_name(style, where, genes, tokenizer, tmp_path, caplog):
    cells, human = mixture(genes, style, where)
    expected = tokens_of(human, tokenizer)[:8]
    genome = style.split("|")[0].rstrip("{}_-")
    with pytest.raises(
        GeneIdError, match=rf"its genes are of 2 genomes: {genome} \(60 genes\), .* Name the one to read with `genome='{genome}'` \(`--genome {genome}`\)"
    ):
        open_cells(cells)
    for name in (genome, genome.upper(), "human"):
        found = dataset_of(cells, tokenizer, tmp_path, genome=name)
        assert found["input_ids"][:] == expected
    assert found["cell_id"][:] == [f"cell{i}" for i in range(8)]
    assert min(found["genome_fraction"][:]) > 0.5
    report = json.loads(found.info.description)
    assert "4 of 12 cells have less than half of their counts in genes of" in report["files"][0]["genome"]
    assert "(cell8, cell9, cell10, cell11)" in report["files"][0]["genome"]
    assert report["left_out_without_genes"] == 4
    assert "(cell8, cell9, cell10, cell11)" in caplog.text


def test_a_mixture_without_prefixes_is_one_too(genes, tokenizer, tmp_path):
    cells, human = mixture(genes, "{}|{}", "ids")
    with pytest.raises(GeneIdError, match=r"its genes are of 2 genomes: human \(60 genes\), mouse \(60 genes\)"):
        open_cells(cells)
    assert dataset_of(cells, tokenizer, tmp_path, genome="human")["input_ids"][:] == tokens_of(human, tokenizer)[:8]


def test_mouse_cells_of_a_mixture_get_no_embedding(genes, tokenizer, model, model_folder, tmp_path, capsys):
    cells, human = mixture(genes)
    found = embed_cells(model, cells, tokenizer=tokenizer, genome="hg19")
    assert np.isnan(found[8:]).all()
    assert np.abs(found[:8] - embed_cells(model, human, tokenizer=tokenizer)[:8]).max() < 1e-6
    path = write(cells, tmp_path / "cells.h5ad")
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 1
    assert "--genome hg19" in capsys.readouterr().err
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad"), "--genome", "hg19"]) == 0
    assert "60 genes of other genomes than hg19 left out" in capsys.readouterr().out
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (written.obs["genome_fraction"] < 0.5).tolist() == [False] * 8 + [True] * 4


def test_a_prefix_of_one_genome_is_taken_off(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    expected = tokens_of(cells, tokenizer)
    cells.var_names = [f"GRCh38_{gene}" for gene in genes]
    found = dataset_of(cells, tokenizer, tmp_path)
    assert found["input_ids"][:] == expected
    assert "prefix 'GRCh38' taken off the names in index of var" in json.loads(found.info.description)["files"][0]["genes"]


def test_a_genome_that_is_not_there_is_refused(genes):
    with pytest.raises(GeneIdError, match=r"no genome 'mm9'. Found: hg19 \(60 genes\), mm10 \(60 genes\). Name one of these"):
        open_cells(mixture(genes)[0], genome="mm9")
    with pytest.raises(GeneIdError, match=r"no genome 'hg19'. Found: no genome, neither in prefixes of names nor in a column. Leave genome out"):
        open_cells(make_cells(genes), genome="hg19")


def test_a_species_may_be_named_for_a_file_of_one_genome_that_does_not_say_which(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    assert dataset_of(cells, tokenizer, tmp_path, genome="human")["input_ids"][:] == tokens_of(cells, tokenizer)


def test_genes_without_a_prefix_beside_another_genome(genes, tokenizer, tmp_path):
    cells, human = mixture(genes, "{}|mm10_{}", "symbols")
    with pytest.raises(GeneIdError, match=r"its genes are of 2 genomes: unprefixed \(60 genes\), mm10 \(60 genes\)"):
        open_cells(cells)
    assert dataset_of(cells, tokenizer, tmp_path, genome="human")["input_ids"][:] == tokens_of(human, tokenizer)[:8]


def test_counts_of_a_mixture_take_the_genome_too(genes, tokenizer):
    cells, human = mixture(genes, where="ids")
    with pytest.raises(GeneIdError, match="2 genomes"):
        tokenizer(cells.X, gene_ids=list(cells.var_names))
    found = tokenizer(cells.X, gene_ids=list(cells.var_names), genome="hg19")["input_ids"]
    assert found[:8] == tokens_of(human, tokenizer)[:8]
    assert [len(cell) for cell in found[8:]] == [tokenizer.n_special_tokens] * 4


def test_a_mixture_stored_by_columns(genes, tokenizer, tmp_path):
    cells, human = mixture(genes)
    cells.X = cells.X.tocsc()
    write(cells, tmp_path / "cells.h5ad")
    found = load_cells(tmp_path / "cells.h5ad", tokenizer=tokenizer, cache_dir=tmp_path / "cache", genome="hg19")
    assert found["input_ids"][:] == tokens_of(human, tokenizer)[:8]


def test_qc_medians_and_info_say_which_genes_they_read(genes, tmp_path, capsys, caplog):
    cells, _ = mixture(genes)
    path = str(write(cells, tmp_path / "cells.h5ad"))
    said = "60 genes, by var['gene_ids']; 60 genes of other genomes than hg19 left out; 4 of 12 cells have less than half of their counts in genes of hg19"
    assert main(["info", path]) == 1
    assert "--genome hg19" in capsys.readouterr().err
    assert main(["info", path, "--genome", "hg19"]) == 0
    assert f"Read as genes: {said}" in capsys.readouterr().out
    assert main(["qc", path, "--genome", "hg19", "--no-doublets", "--output", str(tmp_path / "qc.h5ad")]) == 0
    assert f"{path}: {said}" in capsys.readouterr().out
    assert main(["medians", path, "--genome", "hg19", "--output", str(tmp_path / "genes.json")]) == 0
    assert f"{path}: {said}" in caplog.text


def test_spike_ins_and_a_virus_are_no_mixture(genes, tokenizer, tmp_path):
    cells = make_cells(genes, 12)
    mixed = with_features(cells, ["ERCC-00002", "gene-ORF1ab"], 5, genome=["GRCh38"] * 60 + ["ercc", "SARS-CoV-2"])
    assert dataset_of(mixed, tokenizer, tmp_path)["input_ids"][:] == tokens_of(cells, tokenizer)


def test_counts_with_the_names_of_their_columns_find_ids_too(genes, tokenizer):
    counts = random_counts(4, 60)
    named = [f"hg38_1,{gene},X" for gene in genes]
    assert [list(cell) for cell in tokenizer.encode_counts(counts, named)] == [list(cell) for cell in tokenizer.encode_counts(counts, genes)]


def test_gene_features_can_be_asked_without_a_vocabulary(genes):
    named = GeneFeatures({"a": genes, "symbol": ["x"] * 60}, [str(i) for i in range(60)]).named()
    assert (named.names, named.source) == (genes, "var['a']")


@pytest.mark.shared
def test_the_published_vocabulary_knows_renamed_symbols(shared):
    from geneformer_hf.models.dictionaries import find_dictionaries

    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(shared / "data" / "geneformer_dicts_v2", 20_275))
    table = tokenizer.gene_table
    for old, new in (("SEPT2", "SEPTIN2"), ("SEPT6", "SEPTIN6"), ("MARCH1", "MARCHF1"), ("HLA.A", "HLA-A"), ("MT.CO1", "MT-CO1"), ("NKX2.1", "NKX2-1")):
        assert table.token_of([old]) == table.token_of([new]), old


CASES = {
    "feature_types_gex_adt.h5ad": ({}, 120, "7 features that are not genes left out, by var['feature_types'] (ADT 7)"),
    "genome_prefixes.h5ad": ({"genome": "hg19"}, 120, "120 genes of other genomes than hg19 left out"),
    "ids_inside_names.h5ad": ({}, 120, "120 Ensembl ids found inside longer names"),
    "ids_in_gene_id.h5ad": ({}, 122, "by var['gene_id']"),
    "ensembl_id_with_gaps.h5ad": ({}, 120, "24 genes without an Ensembl id there looked up by symbol"),
    "seuratdisk_factors.h5ad": ({}, 300, "300 of 300 genes"),
}


@pytest.mark.shared
@pytest.mark.parametrize("name", list(CASES))
def test_cases_that_people_reported(name, shared, tmp_path):
    from geneformer_hf.models.dictionaries import find_dictionaries

    options, n_genes, words = CASES[name]
    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(shared / "data" / "geneformer_dicts_v2", 20_275))
    path = shared / "cases" / name
    found = load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path, **options)
    report = json.loads(found.info.description)["files"][0]
    assert report["gene_names"]["n_mapped"] == n_genes
    assert words in report["genes"]
    assert len(found) == open_cells(path, **options).n_cells
    if name.startswith("seurat"):
        assert found.features["seurat_annotations"].names == ["B", "Mono", "NK", "T"]


@pytest.mark.shared
def test_a_case_of_nothing_but_antibodies_is_refused(shared):
    with pytest.raises(GeneIdError, match="none of its 7 features is a gene"):
        open_cells(shared / "cases" / "antibodies_only.h5ad")
