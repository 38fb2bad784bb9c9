"""Raw pickles as the published package writes them, as tables of ours."""

import os
import pickle
from collections import defaultdict

import numpy as np
import pytest

from geneformer_hf import GeneTable, perturbation_statistics
from geneformer_hf.analysis.published import read_published_perturbations
from geneformer_hf.errors import CellFileError, CheckpointError, UnsafePickleError
from tests.conftest import ensembl

TABLE = GeneTable([ensembl(i) for i in range(1, 7)], range(4, 10), [1.0] * 6)


def dump(folder, name, content):
    made = defaultdict(list)
    made.update(content)
    (folder / name).write_bytes(pickle.dumps(made))


def rows(table):
    return [(r["cell_id"], r["kind"], tuple(r["genes"]), r["target"], r["readout"], round(r["value"], 4)) for r in table.to_pylist()]


def test_every_gene_cell_by_cell(tmp_path):
    dump(tmp_path, "in_silico_delete_run_dict_cell_embs_0batch-1_raw.pickle", {(np.int16(4), "cell_emb"): [0.5]})
    dump(tmp_path, "in_silico_delete_run_dict_cell_embs_0batch0_raw.pickle", {(5, "cell_emb"): [0.25]})
    dump(tmp_path, "in_silico_delete_run_dict_cell_embs_1batch-1_raw.pickle", {(4, "cell_emb"): [0.75]})
    dump(tmp_path, "in_silico_delete_run_dict_gene_embs_1batch-1_raw.pickle", {(4, 6): [0.9]})
    table = read_published_perturbations(tmp_path, TABLE)
    first, second, third = ensembl(1), ensembl(2), ensembl(3)
    assert rows(table) == [
        ("0", "delete", (first,), "", "cell", 0.5),
        ("0", "delete", (second,), "", "cell", 0.25),
        ("1", "delete", (first,), "", "cell", 0.75),
        ("1", "delete", (first,), third, "gene", 0.9),
    ]
    found = perturbation_statistics(table, "mixture_model").set_index("Ensembl_ID")
    assert found.loc[first, "Test_avg_shift"] == 0.625


def test_groups_and_states(tmp_path):
    dump(tmp_path, "in_silico_overexpress_g_cell_embs_dict_[4, 5]_raw.pickle", {((4, 5), "cell_emb"): [0.5, 0.75]})
    assert rows(read_published_perturbations(tmp_path, TABLE)) == [
        (str(i), "overexpress", (ensembl(1), ensembl(2)), "", "cell", value) for i, value in enumerate((0.5, 0.75))
    ]
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "in_silico_delete_s_dict_cell_embs_3batch-1_raw.pickle").write_bytes(
        pickle.dumps({"NK": {(4, "cell_emb"): [0.125]}, "B": {(4, "cell_emb"): [-0.5]}})
    )
    assert rows(read_published_perturbations(folder, TABLE)) == [
        ("3", "delete", (ensembl(1),), "NK", "state", 0.125),
        ("3", "delete", (ensembl(1),), "B", "state", -0.5),
    ]


def test_stale_files_of_another_run_are_not_mixed_in(tmp_path):
    for prefix in ("old", "new"):
        dump(tmp_path, f"in_silico_delete_{prefix}_dict_cell_embs_0batch-1_raw.pickle", {(4, "cell_emb"): [0.5]})
    with pytest.raises(CellFileError, match=r"holds raw values of several runs: delete new, delete old\. Pass prefix"):
        read_published_perturbations(tmp_path, TABLE)
    assert read_published_perturbations(tmp_path, TABLE, prefix="new").num_rows == 1


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CellFileError, match="no raw values of the published package here"):
        read_published_perturbations(tmp_path, TABLE)
    name = "in_silico_delete_run_dict_cell_embs_0batch-1_raw.pickle"
    for content, error, message in (
        ({(99, "cell_emb"): [0.5]}, CellFileError, "token 99 is no gene of this vocabulary of 6"),
        ({7: [0.5]}, CellFileError, "7 is not what the published package writes"),
        ([1], CheckpointError, "holds a list; expected a dictionary of raw values"),
    ):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(error, match=message):
            read_published_perturbations(tmp_path, TABLE)


def test_a_hostile_file_executes_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    name = "in_silico_delete_run_dict_cell_embs_0batch-1_raw.pickle"
    (tmp_path / name).write_bytes(pickle.dumps({(4, "cell_emb"): Hostile()}))
    with pytest.raises(UnsafePickleError, match=r"the pickle asks for \w+\.mkdir.*nothing of it was executed"):
        read_published_perturbations(tmp_path, TABLE)
    assert not (tmp_path / "made").exists()
