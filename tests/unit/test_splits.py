"""Splits: every row on one side, donors whole, classes in equal shares, differences tested."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ranksums

from geneformer_hf.data.splits import Split, balance_table, folds, groups_of, most_balanced, one_split, require_enough, require_no_leak
from geneformer_hf.errors import SettingError

ROWS = np.arange(0, 400, 2)
CLASSES = np.random.default_rng(0).choice(3, 400, p=[0.6, 0.3, 0.1])
DONORS = np.random.default_rng(1).integers(0, 8, 400)


def sides(split):
    return [split.train, split.validation, split.test]


@pytest.mark.parametrize("groups", [None, DONORS], ids=["cells", "donors"])
def test_every_row_is_on_one_side(groups):
    split = one_split(ROWS, classes=CLASSES, groups=groups, validation_share=0.1, test_share=0.2, seed=0)
    assert sorted(np.concatenate(sides(split)).tolist()) == ROWS.tolist()
    assert all((np.diff(side) > 0).all() for side in sides(split))
    if groups is None:
        assert [len(side) for side in sides(split)] == [140, 20, 40]
    else:
        assert not set(DONORS[split.train]) & set(DONORS[split.test])
        assert not set(DONORS[split.train]) & set(DONORS[split.validation])


def test_classes_have_equal_shares():
    split = one_split(ROWS, classes=CLASSES, groups=None, validation_share=0.2, test_share=0.2, seed=0)
    for side in sides(split):
        np.testing.assert_allclose(np.bincount(CLASSES[side]) / len(side), np.bincount(CLASSES[ROWS]) / len(ROWS), atol=0.02)


def test_the_same_seed_gives_the_same_split_and_another_another():
    one, two, other = (one_split(ROWS, classes=CLASSES, groups=None, validation_share=0.1, test_share=0.1, seed=seed) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(sides(one), sides(two), strict=True))
    assert (one.test != other.test).any()


@pytest.mark.parametrize("groups", [None, DONORS], ids=["cells", "donors"])
def test_folds_test_every_row_once(groups):
    found = folds(ROWS, n_folds=4, classes=CLASSES, groups=groups, validation_share=0.1, seed=0)
    assert sorted(np.concatenate([split.test for split in found]).tolist()) == ROWS.tolist()
    for split in found:
        assert sorted(np.concatenate(sides(split)).tolist()) == ROWS.tolist()
        if groups is not None:
            assert not set(DONORS[split.test]) & set(DONORS[np.concatenate([split.train, split.validation])])


def test_a_class_of_one_is_trained_on():
    classes = np.zeros(400, dtype=int)
    classes[10] = 1
    split = one_split(ROWS, classes=classes, groups=None, validation_share=0.1, test_share=0.1, seed=0)
    assert 10 in split.train


def test_leaks_are_named():
    split = Split(np.array([0, 1]), np.array([2]), np.array([3]))
    require_no_leak(split, ["a", "a", "b", "c"], "donor")
    with pytest.raises(SettingError, match=r"1 of the values of 'donor' are among train cells and among test cells \(a\)"):
        require_no_leak(split, ["a", "a", "b", "a"], "donor")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_split(ROWS[:4], classes=None, groups=None, validation_share=0.0, test_share=0.1, seed=0), "test_share is 0.1 of 4 items, which is 0"),
        (lambda: one_split(ROWS, classes=None, groups=np.zeros(400, dtype=int), validation_share=0.0, test_share=0.1, seed=0), "1 group is left of group_column"),
        (lambda: folds(ROWS[:3], n_folds=5, classes=None, groups=None, validation_share=0, seed=0), "3 items cannot be cut into 5 folds"),
        (lambda: folds(ROWS, n_folds=9, classes=None, groups=DONORS, validation_share=0, seed=0), "8 groups cannot be cut into 9 folds"),
        (lambda: groups_of(["a", None], "donor", np.array([0, 1])), r"group_column 'donor' is missing in 1 of 2 cells \(first row 1\)"),
        (lambda: require_enough(np.array([0, 0, 1]), ["B", "T"], least=2, why="one for each side"), r"1 of 2 classes have fewer than 2 cells, one for each side: T \(1\)\. Leave them out with rare_threshold: 2"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be_made(call, message):
    with pytest.raises(SettingError, match=message):
        call()


def test_differences_between_sides_are_tested_as_scipy_does():
    rng = np.random.default_rng(2)
    age = rng.normal(50, 10, 400).tolist()
    sex = rng.choice(["f", "m"], 400).tolist()
    age[0], sex[2] = None, None
    split = one_split(ROWS, classes=None, groups=None, validation_share=0.0, test_share=0.3, seed=0)
    table = balance_table(split, {"age": age, "sex": sex}).set_index("column")
    train, test = ([age[i] for i in rows if age[i] is not None] for rows in (split.train, split.test))
    assert table.loc["age", "p_value"] == pytest.approx(ranksums(train, test).pvalue)
    counts = [[sum(sex[i] == value for i in rows) for value in ("f", "m")] for rows in (split.train, split.test)]
    assert table.loc["sex", "p_value"] == pytest.approx(chi2_contingency(counts).pvalue)
    assert table.loc["age", "train"].startswith("mean 5")


def test_the_split_with_the_least_difference_is_taken():
    age = np.random.default_rng(3).normal(50, 10, 400).tolist()
    candidates = [one_split(ROWS, classes=None, groups=None, validation_share=0.0, test_share=0.3, seed=seed) for seed in range(20)]
    best = most_balanced(candidates, {"age": age})
    values = [balance_table(split, {"age": age})["p_value"].min() for split in candidates]
    assert balance_table(best, {"age": age})["p_value"].min() == max(values) > values[0]


@pytest.mark.parametrize("sizes", [[600, 100, 100, 100, 100], [300, *[100] * 7], list(range(130, 60, -10)), [50] * 20], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_whole_groups_come_near_to_the_share_and_follow_the_seed(sizes, share):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rows, found = np.arange(len(groups)), []
    for seed in range(12):
        split = one_split(rows, classes=rows % 2, groups=groups, validation_share=0.0, test_share=share, seed=seed)
        found.append(len(split.test))
        assert not set(groups[split.test]) & set(groups[split.train])
        assert abs(len(split.test) - share * len(rows)) <= max(sizes) / 2 or share * len(rows) < min(sizes)
    tests = {tuple(np.unique(groups[one_split(rows, classes=rows % 2, groups=groups, validation_share=0.0, test_share=share, seed=s).test])) for s in range(12)}
    assert len(tests) > 1


def test_a_class_of_one_donor_is_trained_on_where_it_can_be():
    groups = np.repeat(np.arange(10), 20)
    classes = np.where(groups == 3, 1, 0)
    for seed in range(10):
        split = one_split(np.arange(200), classes=classes, groups=groups, validation_share=0.0, test_share=0.1, seed=seed)
        assert 1 in classes[split.train]
