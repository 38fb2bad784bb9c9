import json

import numpy as np
import pytest

from geneformer_hf import GeneTable
from geneformer_hf.errors import CheckpointError, ColumnNotFoundError, GeneIdError, UnknownGeneError
from geneformer_hf.gene_ids import GeneFeatures, human_genes, is_ensembl_id, species_of
from tests.conftest import ensembl

TP53, GAPDH, ACTB = "ENSG00000141510", "ENSG00000111640", "ENSG00000075624"


@pytest.fixture
def human() -> GeneTable:
    return GeneTable([TP53, GAPDH, ACTB], [2, 3, 4], [1.0, 2.0, 3.0], ["TP53", "GAPDH", ""], {"ENSG00000999999": GAPDH, "C1ORF999": TP53})


@pytest.mark.parametrize(
    ("name", "token"),
    [
        pytest.param(TP53, 2, id="current_id"),
        pytest.param(f"{TP53}.18", 2, id="versioned_id"),
        pytest.param("ensg00000141510", 2, id="lower_case_id"),
        pytest.param("ENSG00000999999", 3, id="retired_id"),
        pytest.param("ENSG00000999999.2", 3, id="retired_versioned_id"),
        pytest.param("TP53", 2, id="symbol_of_the_table"),
        pytest.param("ACTB", 4, id="symbol_of_the_packaged_table"),
        pytest.param("C1orf999", 2, id="alias_in_capitals"),
        pytest.param(" TP53 ", 2, id="spaces_around"),
        pytest.param("tp53", None, id="lower_case_symbol_is_not_human"),
        pytest.param("Actb", None, id="mouse_symbol_is_not_human"),
        pytest.param("ENSA", None, id="symbol_that_begins_like_an_id"),
        pytest.param("ENSMUSG00000059552", None, id="mouse_id"),
    ],
)
def test_one_name_finds_its_gene(human, name, token):
    columns = human.resolve([TP53, GAPDH, ACTB, name], source="test")
    assert columns.token_of_column[3] == (-1 if token is None else token)


def test_the_report_counts_everything(human):
    names = [TP53, f"{GAPDH}.5", "ENSG00000999999", "ACTB", "NOPE", TP53]
    report = human.resolve(names, source="index of var").report
    assert (report.n_genes, report.n_mapped, report.n_tokens, report.n_summed) == (6, 5, 3, 2)
    assert (report.n_versioned, report.n_retired, report.n_symbols, report.unknown) == (1, 1, 1, ("NOPE",))
    text = report.describe()
    for words in ("5 of 6 genes", "1 by symbol", "1 version suffixes", "1 retired", "2 columns summed", "1 not in the vocabulary left out (NOPE)"):
        assert words in text


def test_duplicates_share_a_slot_by_first_appearance(human):
    columns = human.resolve([GAPDH, TP53, "ENSG00000999999"], source="test")
    assert columns.slot_of_column.tolist() == [0, 1, 0]
    assert columns.token_ids.tolist() == [3, 2]
    assert columns.has_merges


def test_an_ambiguous_symbol_is_left_out_and_named():
    table = GeneTable([TP53, GAPDH, ACTB], [2, 3, 4], [1, 1, 1], ["SAME", "SAME", "ACTB"])
    assert table.resolve(["SAME", "ACTB"], source="x").report.ambiguous == ("SAME",)
    with pytest.raises(UnknownGeneError, match=r"1 of 2 genes .*SAME"):
        table.token_of(["SAME", "ACTB"])


def test_the_copy_on_y_is_found_under_its_older_spelling():
    table = GeneTable(["ENSGR0000182378", "ENSG00000182378"], [2, 3], [1, 1])
    assert table.resolve(["ENSG00000182378.15-PAR-Y", "ENSG00000182378.15"], source="x").token_of_column.tolist() == [2, 3]
    assert table.resolve(["ENSG00000182378.15_PAR_Y", "ENSG00000182378.15"], source="x").token_of_column.tolist() == [2, 3]


def test_mouse_ids_are_refused_by_name(human):
    with pytest.raises(GeneIdError, match=r"only 0 of 30 genes .* mouse Ensembl ids \(ENSMUSG00000000000.*orthologues"):
        human.resolve([f"ENSMUSG{i:011d}" for i in range(30)], source="index of var")


def test_mouse_symbols_are_refused(human):
    with pytest.raises(GeneIdError, match="look like mouse or rat symbols"):
        human.resolve(["Actb", "Gapdh", "Trp53"], source="index of var")


def test_very_low_overlap_is_refused_unless_the_vocabulary_is_covered():
    table = GeneTable([ensembl(i) for i in range(100)], range(2, 102), np.ones(100))
    strangers = [ensembl(1000 + i) for i in range(1000)]
    with pytest.raises(GeneIdError, match="only 20 of 1,020 genes"):
        table.resolve([ensembl(i) for i in range(20)] + strangers, source="x")
    assert table.resolve([ensembl(i) for i in range(30)] + strangers, source="x").report.n_mapped == 30


def test_json_round_trip_is_exact(human):
    again = GeneTable.from_json(human.to_json())
    assert again.to_json() == human.to_json()
    assert again.fingerprint == human.fingerprint
    medians = np.random.default_rng(0).random(3)
    table = GeneTable([TP53, GAPDH, ACTB], [2, 3, 4], medians)
    assert np.array_equal(GeneTable.from_json(table.to_json()).medians, medians)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{", "is not a gene table", id="cut_off"),
        pytest.param('{"format": "geneformer_hf.gene_table", "version": 99}', "version 99, expected", id="newer_format"),
        pytest.param("{}", "is not a gene table", id="another_json"),
    ],
)
def test_a_damaged_table_is_refused(text, words):
    with pytest.raises(CheckpointError, match=words):
        GeneTable.from_json(text)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        pytest.param({"ensembl_ids": [TP53, TP53], "token_ids": [2, 3], "medians": [1, 1]}, "distinct Ensembl ids; 1 repeat: ENSG00000141510", id="gene_twice"),
        pytest.param({"ensembl_ids": [TP53, GAPDH], "token_ids": [2, 2], "medians": [1, 1]}, "distinct token ids", id="token_twice"),
        pytest.param({"ensembl_ids": [TP53], "token_ids": [2], "medians": [0]}, "1 of 1 medians are not positive", id="median_zero"),
        pytest.param({"ensembl_ids": [TP53], "token_ids": [2], "medians": [1, 2]}, "columns of one length", id="lengths"),
    ],
)
def test_a_table_that_cannot_be_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GeneTable(**kwargs)


def test_the_fingerprint_follows_what_the_encoding_depends_on(human):
    other = GeneTable(human.ensembl_ids, human.token_ids, human.medians * 2, human.symbols, human.aliases)
    assert other.fingerprint != human.fingerprint


def test_the_packaged_human_table():
    genes = human_genes()
    assert len(genes.biotype_of) == 78_894
    assert genes.ids_of_symbol["TP53"] == (TP53,)
    assert genes.symbol_of[GAPDH] == "GAPDH"
    assert genes.biotype_of[ACTB] == "protein_coding"
    # An earlier symbol: FIRRM was C1orf112 in GENCODE 44.
    assert genes.ids_of_symbol["C1orf112"] == genes.ids_of_symbol["FIRRM"] == ("ENSG00000000460",)


@pytest.mark.parametrize(
    ("columns", "index", "source"),
    [
        pytest.param({"ensembl_id": [TP53, GAPDH]}, ["a", "b"], "var['ensembl_id']", id="ensembl_id"),
        pytest.param({"feature_id": [TP53, GAPDH]}, ["a", "b"], "var['feature_id']", id="feature_id"),
        pytest.param({"gene_ids": ["x", "y"]}, [TP53, GAPDH], "index of var", id="column_without_ids_is_passed_over"),
        pytest.param({"feature_name": ["TP53", "GAPDH"]}, [TP53, GAPDH], "index of var", id="index_before_symbols"),
        pytest.param({"feature_name": ["TP53", "GAPDH"]}, ["0", "1"], "symbols in var['feature_name']", id="symbol_column"),
        pytest.param({}, ["TP53", "GAPDH"], "symbols in the index of var", id="symbols_in_the_index"),
    ],
)
def test_where_the_gene_names_are(columns, index, source):
    assert GeneFeatures(columns, index).named().source == source


def test_the_user_names_the_gene_column():
    named = GeneFeatures({"mine": [TP53], "ensembl_id": [GAPDH]}, ["x"], gene_ids="mine").named()
    assert (named.names, named.source) == ([TP53], "var['mine']")
    named = GeneFeatures({"ensembl_id": [GAPDH]}, [TP53], gene_ids="index").named()
    assert (named.names, named.source) == ([TP53], "index of var")
    with pytest.raises(ColumnNotFoundError, match=r"no column 'other' of text. Found: \['mine'\]"):
        GeneFeatures({"mine": [TP53]}, ["x"], gene_ids="other")


def test_an_index_of_numbers_names_no_genes():
    with pytest.raises(GeneIdError, match=r"nothing in var names the genes: its index reads 0, 1"):
        GeneFeatures({}, ["0", "1"]).named()


def test_ensembl_ids_and_species():
    assert [is_ensembl_id(n) for n in (TP53, "ENSMUSG00000059552.3", "ENSGR0000182378", "ENSG1", "ENSA", "")] == [True, True, True, False, False, False]
    assert species_of(["ENSMUSG00000059552", TP53, "ENSMUSG00000059553"]) == "mouse"
    assert species_of(["x"]) is None


ANYTHING = (-1, 0, 10**12, 1.5, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}, None, True)
LEGAL = {"ensembl_id": ("x",), "token_id": (0,), "median": (1.5, 10**12), "symbol": ("x", "")}


@pytest.mark.parametrize("name", LEGAL)
def test_every_value_of_a_table_is_read_or_refused_by_its_place(name, table):
    content = json.loads(table.to_json())
    whole = content["genes"][name]
    for value in ANYTHING:
        content["genes"][name] = [*whole[:3], value, *whole[4:]]
        if any(value is one or (value == one and type(value) is type(one)) for one in LEGAL[name]):
            if name != "ensembl_id":
                assert len(GeneTable.from_json(json.dumps(content))) == len(table)
            continue
        with pytest.raises(CheckpointError, match=rf"genes\.{name} holds .* at place 3; expected a list of"):
            GeneTable.from_json(json.dumps(content))
        if not isinstance(value, list):
            content["genes"][name] = value
            with pytest.raises(CheckpointError, match=rf"genes\.{name} is .*; expected a list of"):
                GeneTable.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 0), ("version", -1), ("version", float("nan")), ("version", True), ("species", 5), ("source", None), ("aliases", []), ("aliases", {"a": 1})],
)
def test_what_a_table_says_of_itself_is_of_its_type(field, value, table):
    content = json.loads(table.to_json()) | {field: value}
    with pytest.raises(CheckpointError, match=field):
        GeneTable.from_json(json.dumps(content))
