import numpy as np
import pytest
import scipy.sparse as sp

from geneformer_hf import rank_genes
from geneformer_hf.errors import ColumnNotFoundError, NotRawCountsError
from geneformer_hf.ranking import choose_counts, count_problem, rank_columns
from tests import reference
from tests.conftest import random_counts

TOKENS, ONES = np.array([2, 3, 4]), np.ones(3)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([5, 0, 1], [2, 4], id="undetected_gene_is_absent"),
        pytest.param([3, 3, 3], [2, 3, 4], id="ties_keep_column_order"),
        pytest.param([1, 3, 3], [3, 4, 2], id="ties_after_a_lower_value"),
        pytest.param([0, 0, 0], [], id="empty_cell_gives_no_tokens"),
        pytest.param([0, 0, 7], [4], id="cell_with_one_gene"),
    ],
)
def test_rank_genes_orders_by_scaled_expression(counts, expected):
    (ranked,) = rank_genes(sp.csr_array([counts]), TOKENS, ONES, np.array([10]))
    assert ranked.tolist() == expected
    assert ranked.dtype == np.int32


def test_medians_divide():
    (ranked,) = rank_genes(np.array([[4, 6, 9]]), TOKENS, np.array([1.0, 2.0, 3.0]))
    assert ranked.tolist() == [2, 3, 4]
    (ranked,) = rank_genes(np.array([[4, 9, 9]]), TOKENS, np.array([1.0, 2.0, 3.0]))
    assert ranked.tolist() == [3, 2, 4]


def test_stored_zeros_are_not_detected():
    counts = sp.csr_array((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))
    assert [r.tolist() for r in rank_genes(counts, TOKENS, ONES)] == [[3]]


def test_columns_of_one_gene_are_summed():
    (ranked,) = rank_genes(np.array([[2, 3, 2]]), np.array([7, 8, 7]), ONES)
    assert ranked.tolist() == [7, 8]


def test_left_out_columns_and_unsorted_duplicate_entries():
    counts = sp.csr_array((np.array([1.0, 5.0, 2.0, 9.0]), np.array([2, 0, 2, 1]), np.array([0, 4])), shape=(1, 3))
    (ranked,) = rank_genes(counts, np.array([2, -1, 4]), ONES)
    assert ranked.tolist() == [2, 4]
    (ranked,) = rank_genes(counts, np.array([2, -1, 4]), np.array([2.0, 1.0, 1.0]))
    assert ranked.tolist() == [4, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint16])
def test_rank_genes_equals_the_naive_loop(dtype):
    rng = np.random.default_rng(3)
    counts = random_counts(50, 400, seed=3).astype(dtype)
    medians = rng.choice([0.5, 1.0, 1.5, 2.0, 2.7182818], 400)
    tokens = rng.permutation(np.arange(2, 402))
    tokens[::7] = -1
    ours = rank_genes(counts, tokens, medians)
    dense = counts.toarray().astype(np.float64)
    assert [r.tolist() for r in ours] == [reference.rank_cell(row, tokens, medians) for row in dense]


def test_rank_genes_equals_the_published_formula_where_values_differ():
    rng = np.random.default_rng(4)
    counts = random_counts(50, 400, seed=4)
    # Medians without simple ratios: no ties, so nothing is left to a rule.
    medians, tokens = rng.lognormal(0, 1, 400), np.arange(2, 402)
    dense = counts.toarray().astype(np.float64)
    ours = rank_genes(counts, tokens, medians)
    assert [r.tolist() for r in ours] == [reference.rank_exactly(row, tokens, medians) for row in dense]


def test_scaling_a_cell_changes_nothing():
    counts = random_counts(40, 300, seed=5)
    medians = np.random.default_rng(5).choice([0.3, 0.6, 0.7, 1.1, 2.2], 300)
    tokens = np.arange(2, 302)
    once = rank_genes(counts, tokens, medians)
    for factor in (3, 7, 1000):
        assert all(np.array_equal(a, b) for a, b in zip(once, rank_genes(counts * factor, tokens, medians), strict=True))


def test_most_front_and_back_leave_room():
    counts = sp.csr_array(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    columns, offsets = rank_columns(counts, ONES, most=2, front=1, back=1)
    assert offsets.tolist() == [0, 4, 6]
    assert columns[1:3].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param([0.0, 1.5, 3.2], "looks log-normalised (largest value 3.2, 2 of 3 values not whole", id="log_normalised"),
        pytest.param([0.5, 900.0], "looks normalised (largest value 900", id="normalised"),
        pytest.param([-1.0, 2.0], "looks scaled (smallest value -1, 1 of 2 values negative)", id="scaled"),
        pytest.param([-3, 2], "looks scaled", id="negative_integers"),
        pytest.param([np.nan, 2.0], "1 values that are NaN or infinite among 2", id="nan"),
        pytest.param([np.inf, 2.0], "NaN or infinite", id="infinite"),
    ],
)
def test_what_is_not_a_count_is_described(values, words):
    assert words in count_problem(np.array(values))
    with pytest.raises(NotRawCountsError, match="raw transcript counts"):
        rank_genes(np.array([values]), np.arange(2, 2 + len(values)), np.ones(len(values)))


def test_totals_below_the_counts_are_refused():
    with pytest.raises(NotRawCountsError, match=r"1 of 1 cells \(cell 0: total 3, counts 8\)"):
        rank_genes(np.array([[5, 3]]), np.array([2, 3]), np.ones(2), np.array([3]))


def test_counts_are_looked_for_in_x_then_raw_then_the_counts_layer():
    good, bad = (lambda: np.array([1.0, 2.0])), (lambda: np.array([0.1, 2.0]))
    assert choose_counts({"X": good, "raw.X": good}) == "X"
    assert choose_counts({"X": bad, "raw.X": good, "counts": good}) == "raw.X"
    assert choose_counts({"X": bad, "counts": good}) == "counts"
    assert choose_counts({"X": good, "other": good}, "other") == "other"
    assert choose_counts({"X": bad, "raw.X": good}, "raw") == "raw.X"
    with pytest.raises(NotRawCountsError, match=r"X looks log-normalised.*other layers: other"):
        choose_counts({"X": bad, "other": good})
    with pytest.raises(NotRawCountsError, match="other looks"):
        choose_counts({"X": good, "other": bad}, "other")
    with pytest.raises(ColumnNotFoundError, match=r"no layer 'missing'. Found: X"):
        choose_counts({"X": good}, "missing")
