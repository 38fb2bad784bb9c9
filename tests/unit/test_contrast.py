"""Contrast across batches against an explicit loop."""

import numpy as np
import pytest
import torch

from geneformer_hf.models.contrast import contrast_across
from tests import reference
from tests.tolerances import NAIVE_TWIN

CASES = {
    "all_have_partners_elsewhere": ([0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0]),
    "some_only_in_their_own_batch": ([0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1]),
    "unknown_classes_and_batches": ([0, -100, 0, 1, 1, 0], [0, 1, -100, 0, 1, 1]),
    "one_cell": ([3], [0]),
    "nobody_is_known": ([-100, -100], [0, 1]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_contrast_equals_the_naive_loop(case):
    classes, batches = CASES[case]
    vectors = np.random.default_rng(len(case)).normal(size=(len(classes), 5))
    given = torch.tensor(vectors, dtype=torch.float32, requires_grad=True)
    found = contrast_across(given, torch.tensor(classes), torch.tensor(batches))
    assert found.item() == pytest.approx(reference.contrast(vectors.tolist(), classes, batches, 0.1), abs=NAIVE_TWIN)
    found.backward()
    assert torch.isfinite(given.grad).all()


def test_the_gradient_is_that_of_the_naive_loop():
    classes, batches = CASES["some_only_in_their_own_batch"]
    vectors = np.random.default_rng(1).normal(size=(6, 3))
    given = torch.tensor(vectors, dtype=torch.float32, requires_grad=True)
    contrast_across(given, torch.tensor(classes), torch.tensor(batches)).backward()
    for i, j in ((0, 0), (3, 2), (5, 1)):
        ends = []
        for step in (1e-4, -1e-4):
            moved = vectors.copy()
            moved[i, j] += step
            ends.append(reference.contrast(moved.tolist(), classes, batches, 0.1))
        assert float(given.grad[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-4)
