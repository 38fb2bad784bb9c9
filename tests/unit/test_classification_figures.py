"""Figures against counting by hand."""

import numpy as np
import pytest

from geneformer_hf.models.heads import entropy, heads_of, softmax
from geneformer_hf.reports.classification import class_figures, label_figures, mean_roc, number_figures, roc_curve


def test_counted_by_hand():
    labels = np.array([0, 0, 1, 1, 2, -100])
    p = np.array([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [1, 0, 0]])
    found = class_figures(labels, p, ["a", "b", "c"])
    assert found["n"] == 5
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["balanced_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 1) / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.6, 0.4]).mean())
    truth = np.eye(3)[labels[:5]]
    assert found["brier"] == pytest.approx(np.square(p[:5] - truth).sum(axis=1).mean())
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 1]]
    # Bins of confidence: 0.4 and 0.5 alone, 0.6, 0.7, 0.8.
    assert found["ece"] == pytest.approx((abs(0.4 - 1) + abs(0.5 - 0) + abs(0.6 - 1) + abs(0.7 - 1) + abs(0.8 - 1)) / 5)


def test_classes_that_do_not_occur_spoil_no_mean():
    found = class_figures(np.array([0, 0, 1]), np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0]]), ["a", "b", "never"])
    assert (found["balanced_accuracy"], found["macro_f1"], found["roc_auc"]) == (1.0, 1.0, 1.0)


def test_two_classes_have_the_curve_of_the_second():
    p = np.array([0.1, 0.4, 0.35, 0.8])
    found = class_figures(np.array([0, 0, 1, 1]), np.stack([1 - p, p], axis=1), ["no", "yes"])
    assert found["roc_auc"] == pytest.approx(0.75)


def test_labels_that_hold_together():
    found = label_figures(np.array([[1, 0], [1, 1], [0, 0]]), np.array([[0.9, 0.2], [0.4, 0.8], [0.1, 0.1]]), ["a", "b"])
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["all_right"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_numbers():
    found = number_figures(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [2.0], [5.0]]), ["age"])
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(4 / 3))
    assert found["r2"] == pytest.approx(1 - 4 / 2)
    assert found["spearman"] == pytest.approx(1.0)


def test_mean_curves_weigh_by_length_or_alike():
    rng = np.random.default_rng(0)
    curves = []
    for n in (20, 200):
        y = rng.random(n) < 0.5
        curves.append(roc_curve(y, y + rng.normal(0, 1, n)))
    lengths = np.array([len(curve.true_positive_rate) for curve in curves])
    areas = np.array([curve.auc for curve in curves])
    by_length, plain = mean_roc(curves, weighted=True), mean_roc(curves, weighted=False)
    assert by_length.auc == pytest.approx((lengths * areas).sum() / lengths.sum())
    assert plain.auc == pytest.approx(areas.mean())
    assert plain.sd == pytest.approx(areas.std())
    assert len(by_length.true_positive_rate) == 100
    assert by_length.true_positive_rate[0] == 0


def test_probabilities_of_large_logits_are_finite():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
    assert entropy(np.array([[0.25] * 4]))[0] == pytest.approx(np.log(4))


def test_heads_are_read_from_a_configuration():
    from geneformer_hf import GeneformerConfig

    (one,) = heads_of(GeneformerConfig(id2label={0: "a", 1: "b"}, label_columns=["kind"], problem_type="single_label_classification"))
    assert (one.name, one.names, one.stop) == ("kind", ["a", "b"], 2)
    two = heads_of(GeneformerConfig(task_labels={"x": ["1", "2"], "y": ["3", "4", "5"]}))
    assert [(h.name, h.start, h.stop) for h in two] == [("x", 0, 2), ("y", 2, 5)]


def test_one_label_is_counted_where_it_holds():
    found = label_figures(np.array([[1.0], [0], [0], [0]]), np.array([[0.9], [0.8], [0.1], [0.1]]), ["T"])
    (row,) = found["per_class"]
    assert (row["n"], row["precision"], row["recall"]) == (1, 0.5, 1.0)
    assert found["micro_f1"] == pytest.approx(2 / 3)


def test_nothing_to_count_is_not_a_number():
    found = class_figures(np.array([-100, -100]), np.full((2, 2), 0.5), ["a", "b"])
    assert found["n"] == 0
    assert np.isnan(found["accuracy"])
    assert np.isnan(number_figures(np.array([[1.0]]), np.array([[2.0]]), ["age"])["r2"])
