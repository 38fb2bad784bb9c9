"""Labels as numbers: sorted classes, flags, measurements, tables of genes; and what cannot be a label."""

import subprocess
import sys

import numpy as np
import pytest

from geneformer_hf.data.labels import balanced_weights, class_ids, label_matrix, match_gene_classes, numbers_of, read_gene_classes
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, SettingError, UnknownGeneError


def test_classes_are_sorted_and_missing_ones_ignored():
    names, ids = class_ids(["T", None, "B", float("nan"), " ", "T", 2.0, True])
    assert names == ["2", "B", "T", "True"]
    assert ids.tolist() == [2, -100, 1, -100, -100, 2, 0, 3]


@pytest.mark.slow
def test_class_ids_do_not_depend_on_the_hash_seed():
    code = "from geneformer_hf.data.labels import class_ids; print(class_ids(['T', 'B', 'NK', 'DC', 'Mono'])[0])"
    found = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True).stdout
        for seed in "12"
    }
    assert found == {"['B', 'DC', 'Mono', 'NK', 'T']\n"}


def test_labels_that_are_not_known_are_ignored():
    assert class_ids(["B", "X"], ["B", "T"])[1].tolist() == [0, -100]


def test_flags_of_several_columns():
    names, held = label_matrix({"is_t": [1, 0, None], "is_b": ["False", True, "yes"]})
    assert names == ["is_t", "is_b"]
    np.testing.assert_array_equal(held, [[1, 0], [0, 1], [np.nan, 1]])
    with pytest.raises(SettingError, match="column 'a' holds 2; expected 0 and 1"):
        label_matrix({"a": [0, 2], "b": [0, 1]})


def test_labels_in_one_text():
    names, held = label_matrix({"markers": ["CD3; CD4", ["CD8", "CD3"], "", None]})
    assert names == ["CD3", "CD4", "CD8"]
    np.testing.assert_array_equal(held[:2], [[1, 1, 0], [1, 0, 1]])
    assert np.isnan(held[2:]).all()


def test_numbers():
    assert numbers_of({"age": [1, "2.5", None]})[:, 0].tolist()[:2] == [1.0, 2.5]
    with pytest.raises(SettingError, match=r"column 'age' holds 'old' \(1 of 2 values are no finite numbers\)"):
        numbers_of({"age": [1, "old"]})


def test_balanced_weights_have_a_mean_of_one():
    ids = np.array([0, 0, 0, 1, -100, -100])
    weights = np.array(balanced_weights(ids, 2))
    assert weights[ids[ids >= 0]].mean() == pytest.approx(1)
    assert weights[1] == pytest.approx(3 * weights[0])


def test_genes_by_id_symbol_and_alias(table, genes):
    found = match_gene_classes({"b": [genes[0], "SYM3"], "a": ["OLDSYM", f"{genes[4]}.2", "ENSG99999999999"]}, table)
    assert found.names == ["a", "b"]
    assert dict(zip(found.token_ids.tolist(), found.class_ids.tolist(), strict=True)) == {4: 1, 5: 0, 7: 1, 8: 0}
    assert found.unknown == ["ENSG99999999999"]
    assert found.of_tokens(10).tolist() == [-100, -100, -100, -100, 1, 0, -100, 1, 0, -100]
    assert (found.of_tokens(10, np.array([0])) >= 0).sum() == 1


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ({"a": ["SYM1"]}, SettingError, r"1 class \(a\); expected at least two"),
        ({"a": ["SYM1", "SYM2"], "b": ["SYM2"]}, SettingError, r"1 genes have two classes: SYM2 \(a and b\)"),
        ({"a": ["SYM1"], "b": ["NOPE"]}, UnknownGeneError, r"the vocabulary has none of the 1 genes of class 'b' \(such as NOPE\)"),
    ],
)
def test_tables_of_genes_that_cannot_be_used(table, classes, error, message):
    with pytest.raises(error, match=message):
        match_gene_classes(classes, table)


def test_tables_of_genes_from_files(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ["g1"], "y": ["g2", "g3"]}')
    (tmp_path / "a.csv").write_text("ensembl_id,name,class\ng1,one,x\ng2,two,y\ng3,three,y\n")
    (tmp_path / "a.tsv").write_text("anything\twhatever\ng1\tx\ng2\ty\ng3\ty\n")
    expected = {"x": ["g1"], "y": ["g2", "g3"]}
    assert all(read_gene_classes(tmp_path / name) == expected for name in ("a.json", "a.csv", "a.tsv"))


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.csv", "ensembl_id,one,two\ng,x,y\n", ColumnNotFoundError, "has the columns ensembl_id, one, two; expected one of genes .* and one of classes"),
        ("a.csv", "gene,class\ng,\n", CellFileError, "1 of 1 rows lack a gene .* or a class"),
        ("a.json", "[1]", CellFileError, "holds a list; expected {class"),
        ("a.json", "{", CellFileError, "it is not JSON"),
        ("b.csv", None, CellFileError, "cannot be read"),
    ],
)
def test_files_of_genes_that_cannot_be_read(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_gene_classes(tmp_path / name)


def test_a_class_that_nobody_is_taught_has_the_usual_weight():
    assert balanced_weights(np.array([0, 0, 1, 1]), 3) == [1.0, 1.0, 1.0]


def test_one_column_of_flags():
    names, held = label_matrix({"is_t": [1, 0, None]})
    assert names == ["is_t"]
    np.testing.assert_array_equal(held, [[1], [0], [np.nan]])
