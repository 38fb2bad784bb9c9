"""Figures of embeddings: known answers on made-up cells, naive twins, and what is not defined."""

import builtins
import math

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from geneformer_hf.errors import MissingExtraError, SettingError
from geneformer_hf.reports.expression import principal_components, variable_expression
from geneformer_hf.reports.integration import integration_figures
from geneformer_hf.reports.label_transfer import KNN, MAJORITY, PROBE, means, transfer, transfer_folds
from tests.conftest import random_counts

N = 60
LABELS = np.repeat([0, 1, 2], N // 3)
BATCHES = np.tile([0, 1], N // 2)


def blobs(seed=0, apart=20.0, shift=0.0):
    """Three types far apart; a second batch that lies `shift` away within each type."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(N, 6)) + apart * np.eye(6)[LABELS] + shift * np.eye(6)[4] * BATCHES[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def figures():
    noise = np.random.default_rng(1).normal(size=(N, 6)).astype(np.float32)
    return {
        name: integration_figures(vectors, LABELS, BATCHES, expression_ng=blobs(shift=5.0))
        for name, vectors in {"apart": blobs(), "batchy": blobs(shift=5.0), "noise": noise}.items()
    }


def test_types_far_apart_are_perfect(figures):
    apart = figures["apart"]
    assert apart["nmi"] == apart["ari"] == apart["graph_connectivity"] == pytest.approx(1)
    assert apart["asw_label"] > 0.85
    assert apart["pcr"] > 0.5, "the batch explains less than in expression"


def test_noise_is_not(figures):
    assert figures["noise"]["ari"] < 0.2
    assert figures["noise"]["asw_label"] < 0.6
    assert figures["noise"]["avg_bio"] < figures["apart"]["avg_bio"] - 0.3


def test_batches_that_lie_apart_lower_the_figures_of_integration(figures):
    assert figures["batchy"]["asw_batch"] < figures["apart"]["asw_batch"] - 0.2
    assert figures["batchy"]["pcr"] == pytest.approx(0, abs=1e-5), "compared with itself"
    assert figures["batchy"]["avg_batch"] < figures["apart"]["avg_batch"]


@pytest.mark.parametrize("name", ["apart", "batchy", "noise"])
def test_sums_are_those_of_the_paper(figures, name):
    found = figures[name]
    assert found["avg_bio"] == pytest.approx((found["nmi"] + found["ari"] + found["asw_label"]) / 3)
    assert found["avg_batch"] == pytest.approx((found["asw_batch"] + found["graph_connectivity"] + found["pcr"]) / 3)
    assert found["overall"] == pytest.approx(0.6 * found["avg_bio"] + 0.4 * found["avg_batch"])
    assert all(0 <= value <= 1 for key, value in found.items() if key != "ari"), found


def test_silhouettes_are_those_of_scikit_learn(figures):
    vectors = blobs(shift=5.0)
    assert figures["batchy"]["asw_label"] == pytest.approx((silhouette_score(vectors, LABELS) + 1) / 2, abs=1e-4)
    from sklearn.metrics import silhouette_samples

    within = [1 - np.abs(silhouette_samples(vectors[t == LABELS], BATCHES[t == LABELS])).mean() for t in range(3)]
    assert figures["batchy"]["asw_batch"] == pytest.approx(np.mean(within), abs=1e-4)


def test_same_seed_same_figures(figures):
    assert integration_figures(blobs(), LABELS, BATCHES, expression_ng=blobs(shift=5.0)) == figures["apart"]


def test_without_batches_there_are_no_figures_of_them():
    assert set(integration_figures(blobs(), LABELS)) == {"nmi", "ari", "asw_label", "avg_bio"}


def test_batches_that_share_no_label_have_no_silhouette():
    found = integration_figures(blobs(), LABELS, (LABELS == 2).astype(int))
    assert math.isnan(found["asw_batch"])
    assert math.isnan(found["pcr"]), "no expression was given"
    assert found["avg_batch"] == found["graph_connectivity"]


def test_cells_that_lie_upon_each_other_are_measured():
    same = np.repeat(blobs()[::20], 20, axis=0)
    found = integration_figures(same, LABELS, BATCHES)
    assert found["nmi"] == pytest.approx(1)


def test_without_scib_metrics_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scib_metrics"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"geneformer-hf\[evaluation,plot\]"):
        integration_figures(blobs(), LABELS)


NAMES = ["a", "b", "c"]


def test_each_group_is_tested_by_itself_where_there_are_few():
    folds = transfer_folds(LABELS, BATCHES, ["one", "two"], n_folds=5, seed=0)
    assert [fold.name for fold in folds] == ["one", "two"]
    for fold in folds:
        assert not set(BATCHES[fold.train]) & set(BATCHES[fold.test])


@pytest.mark.parametrize("seed", [0, 1])
def test_no_donor_is_on_both_sides(seed):
    donors = np.arange(N) % 13
    folds = transfer_folds(LABELS, donors, [f"d{i}" for i in range(13)], n_folds=4, seed=seed)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(N)), "each cell is tested once"
    for fold in folds:
        assert not set(donors[fold.train]) & set(donors[fold.test])
        assert sorted([*fold.train, *fold.test]) == list(range(N))


def test_without_groups_cells_are_cut_at_random():
    folds = transfer_folds(LABELS, None, [], n_folds=3, seed=0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(N))
    assert all(np.bincount(LABELS[fold.test]).tolist() == [7, 7, 6] or set(np.bincount(LABELS[fold.test])) <= {6, 7} for fold in folds)


def test_one_group_is_refused():
    with pytest.raises(SettingError, match="all 60 cells are of 'only'"):
        transfer_folds(LABELS, np.zeros(N, dtype=int), ["only"], n_folds=5, seed=0)


def test_clear_labels_are_transferred_and_noise_is_not():
    folds = transfer_folds(LABELS, BATCHES, ["one", "two"], n_folds=5, seed=0)
    clear = transfer(blobs(), LABELS, NAMES, folds, standardised=True)
    noise = transfer(np.random.default_rng(1).normal(size=(N, 6)), LABELS, NAMES, folds, standardised=True)
    for method in (KNN, PROBE):
        assert means(clear, method) == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}
        assert means(noise, method)["accuracy"] < 0.7
    assert means(clear, MAJORITY)["balanced_accuracy"] == pytest.approx(1 / 3)
    assert {row["f1_by_class"]["a"] for row in clear if row["method"] == KNN} == {1.0}


def test_labels_nobody_was_taught_are_counted_and_not_judged():
    labels = LABELS.copy()
    labels[BATCHES == 1] = np.where(labels[BATCHES == 1] == 2, 3, labels[BATCHES == 1])
    folds = transfer_folds(labels, BATCHES, ["one", "two"], n_folds=5, seed=0)
    rows = [row for row in transfer(blobs(), labels, [*NAMES, "d"], folds, standardised=False) if row["method"] == KNN]
    assert [row["n_unseen"] for row in rows] == [10, 10]
    assert [row["n_test"] for row in rows] == [20, 20]
    assert all(row["accuracy"] == 1 for row in rows)


def test_a_fold_of_unknown_labels_alone_does_not_count():
    labels = np.where(BATCHES == 1, 3, LABELS)
    rows = transfer(blobs(), labels, [*NAMES, "d"], transfer_folds(labels, BATCHES, ["one", "two"], n_folds=5, seed=0), standardised=False)
    assert math.isnan(means(rows, KNN)["accuracy"])


def test_log_counts_are_the_plain_formula():
    counts = random_counts(40, 30, seed=3)
    found = variable_expression(counts)
    dense = counts.toarray()
    expected = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)[:, (dense > 0).any(axis=0)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_variable_genes_are_chosen_beyond_two_thousand():
    counts = random_counts(40, 2100, seed=3).tolil()
    counts[:20, 7], counts[20:, 7] = 900, 0
    found = variable_expression(counts.tocsr(), np.tile([0, 1], 20))
    assert found.shape == (40, 2000)
    assert found[:20].max() > 5, "a gene that is there in half of the cells is among them"


def test_components_are_those_of_the_covariance():
    values = variable_expression(random_counts(40, 30, seed=3))
    found = principal_components(values)
    assert found.shape == (40, 29)
    _, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.sort(found.std(axis=0))[::-1][:5], singular[:5] / np.sqrt(40), rtol=1e-3)
