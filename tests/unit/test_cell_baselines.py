"""Baselines: fitted to training rows alone, the same applied in parts or at once; expression against a loop."""

import numpy as np
import pytest

from geneformer_hf import load_cells
from geneformer_hf.reports.cell_baselines import expression_matrix, fitted, most_variable

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.normal(size=(60, 4)), RNG.normal(size=(25, 4))
CLASSES = (TRAIN[:, 0] > 0).astype(np.int64)


@pytest.mark.parametrize("kind", ["majority", "linear", "neighbours"])
@pytest.mark.parametrize(
    ("problem", "labels", "n"),
    [
        ("single_label_classification", CLASSES, 3),
        ("multi_label_classification", np.stack([CLASSES, np.zeros(60), np.ones(60)], axis=1).astype(np.float32), 3),
        ("regression", TRAIN[:, :2].astype(np.float32), 2),
        ("regression", TRAIN[:, :1].astype(np.float32), 1),
    ],
)
def test_applied_in_parts_as_at_once(kind, problem, labels, n):
    model = fitted(kind, problem, TRAIN, labels, n)
    whole = model(TEST)
    assert whole.shape == (25, n)
    np.testing.assert_allclose(np.concatenate([model(TEST[:7]), model(TEST[7:])]), whole)
    if problem == "single_label_classification":
        np.testing.assert_allclose(whole.sum(axis=1), 1)
    if problem == "multi_label_classification":
        np.testing.assert_array_equal(whole[:, 1:], np.tile([0.0, 1.0], (25, 1)))


def test_each_learns_what_there_is():
    truth = (TEST[:, 0] > 0).astype(int)
    right = {
        kind: (fitted(kind, "single_label_classification", TRAIN, CLASSES, 2)(TEST).argmax(1) == truth).mean() for kind in ("majority", "linear", "neighbours")
    }
    assert right["majority"] < 0.7 < min(right["linear"], right["neighbours"])


def test_labels_that_are_missing_do_not_count():
    labels = np.where(np.arange(60) < 30, CLASSES, -100)
    np.testing.assert_allclose(
        fitted("linear", "single_label_classification", TRAIN, labels, 2)(TEST),
        fitted("linear", "single_label_classification", TRAIN[:30], CLASSES[:30], 2)(TEST),
    )
    np.testing.assert_allclose(fitted("linear", "single_label_classification", TRAIN, np.full(60, -100), 2)(TEST), 0.5)


@pytest.mark.parametrize("known", [True, False], ids=["counts", "ranks"])
def test_expression_against_the_loop(cells, tokenizer, known):
    dataset = load_cells(cells, tokenizer=tokenizer, obs="none", keep_counts=known)
    rows = np.array([3, 0, 17])
    found = expression_matrix(dataset, rows, len(tokenizer), [0, 2, 3]).toarray()
    expected = np.zeros((3, len(tokenizer)))
    for i, row in enumerate(rows.tolist()):
        cell = dataset[row]
        for place, token in enumerate(cell["input_ids"]):
            if token not in (0, 2, 3):
                expected[i, token] = np.log1p(cell["counts"][place]) if known else 1 - place / len(cell["input_ids"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(
        np.sort(most_variable(expression_matrix(dataset, np.arange(30), len(tokenizer), [0, 2, 3]), 5)),
        np.sort(np.argsort(-expression_matrix(dataset, np.arange(30), len(tokenizer), [0, 2, 3]).toarray().var(axis=0), kind="stable")[:5]),
    )
