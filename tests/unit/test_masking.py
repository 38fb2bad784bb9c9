"""Which genes are hidden: shares, specials, and what a mask depends on."""

import numpy as np
import pytest

from geneformer_hf.data.collators import DataCollatorForMaskedGenes
from geneformer_hf.data.masking import CellKey, GeneMasker, MaskingRates
from geneformer_hf.errors import SettingError, VocabularyMismatchError
from tests import reference

N_CELLS, LENGTH = 1000, 1000


def hide(masker, cells, keys):
    lengths = np.array([len(cell) for cell in cells])
    ids, labels = masker.hide(np.concatenate(cells), lengths, keys)
    ends = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, ends), np.split(labels, ends), strict=True))


def random_cells(n, rng, longest=58):
    return [np.concatenate([[2], 4 + rng.permutation(60)[: rng.integers(3, longest)], [3]]) for _ in range(n)]


def test_shares_over_a_million_tokens_are_within_binomial_bounds(tokenizer):
    rng = np.random.default_rng(0)
    cells = rng.integers(4, 64, (N_CELLS, LENGTH))
    cells[:, 0], cells[:, -1] = 2, 3
    ids, labels = GeneMasker(tokenizer, seed=1).hide(cells.ravel(), np.full(N_CELLS, LENGTH), [CellKey(0, i, 0) for i in range(N_CELLS)])
    ids, labels, genes = ids.reshape(cells.shape), labels.reshape(cells.shape), cells[:, 1:-1].size
    chosen = labels != -100

    def within(found, share, n):
        return abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5

    assert not chosen[:, [0, -1]].any()
    assert within(chosen.sum() / genes, 0.15, genes)
    n = chosen.sum()
    assert within((ids[chosen] == 1).sum() / n, 0.8, n)
    other = (ids[chosen] != 1) & (ids[chosen] != cells[chosen])
    # One random gene in sixty is the gene itself.
    assert within(other.sum() / n, 0.1 * 59 / 60, n)
    drawn = np.bincount(ids[chosen][other], minlength=64)
    assert drawn[:4].sum() == 0
    assert all(within(count / other.sum(), 1 / 60, other.sum()) for count in drawn[4:])
    np.testing.assert_array_equal(ids[~chosen], cells[~chosen])
    # Neither the place in a cell nor the cell has a say.
    assert all(within(column.mean(), 0.15, N_CELLS) for column in chosen[:, 1:-1].T[::50])


@pytest.mark.parametrize("rates", [(0.15, 0.8, 0.1), (0.5, 0.3, 0.7), (0.3, 0.0, 0.0)])
def test_masks_equal_the_naive_loop(tokenizer, rates):
    rng = np.random.default_rng(1)
    cells = random_cells(20, rng)
    keys = [CellKey(int(rng.integers(3)), int(rng.integers(1 << 40)), int(rng.integers(1 << 62))) for _ in cells]
    found = hide(GeneMasker(tokenizer, MaskingRates(*rates), seed=5), cells, keys)
    genes = tokenizer.gene_table.token_ids.tolist()
    for (ids, labels), cell, key in zip(found, cells, keys, strict=True):
        assert (ids.tolist(), labels.tolist()) == reference.hide_genes(cell.tolist(), key, genes, set(tokenizer.all_special_ids), 1, 5, rates)


def test_a_mask_depends_on_seed_corpus_row_and_pass_and_on_nothing_else(tokenizer):
    cells = random_cells(12, np.random.default_rng(2))
    keys = [CellKey(0, i, 3) for i in range(12)]
    alone = [hide(GeneMasker(tokenizer, seed=7), [cell], [key])[0] for cell, key in zip(cells, keys, strict=True)]
    order = np.random.default_rng(0).permutation(12)
    together = hide(GeneMasker(tokenizer, seed=7), [cells[i] for i in order], [keys[i] for i in order])
    for place, i in enumerate(order):
        np.testing.assert_array_equal(together[place][0], alone[i][0])
    cell = np.tile(cells[0], 5)
    masker = GeneMasker(tokenizer, seed=7)
    variants = [hide(m, [cell], [k])[0][1] for m, k in [
        (masker, CellKey(0, 0, 3)), (masker, CellKey(1, 0, 3)), (masker, CellKey(0, 1, 3)), (masker, CellKey(0, 0, 4)), (GeneMasker(tokenizer, seed=8), CellKey(0, 0, 3)),
    ]]  # fmt: skip
    assert len({labels.tobytes() for labels in variants}) == 5


def test_a_vocabulary_without_cls_and_eos(v1_tokenizer):
    ids, labels = GeneMasker(v1_tokenizer, MaskingRates(chosen=0.9), seed=0).hide(np.arange(2, 62), np.array([60]), [CellKey(0, 0, 0)])
    assert (labels != -100).sum() > 40
    assert set(ids.tolist()) <= set(range(1, 62))


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.0, 0.8, 0.1), r"mask_probability is 0\.0; expected a share between 0 and 1"),
        ((0.15, 0.8, 0.3), r"mask_share is 0\.8 and random_share 0\.3; expected shares of 0 or more that add up to 1 at most"),
        ((0.15, -0.1, 0.1), "expected shares of 0 or more"),
    ],
)
def test_impossible_rates_are_refused(rates, message):
    with pytest.raises(SettingError, match=message):
        MaskingRates(*rates)


def test_ids_beyond_the_vocabulary_name_the_row(tokenizer):
    with pytest.raises(VocabularyMismatchError, match=r"row 41 of corpus 0 holds the token id 64, and the vocabulary has 64 tokens"):
        GeneMasker(tokenizer).hide(np.array([2, 5, 3, 2, 64, 3]), np.array([3, 3]), [CellKey(0, 40, 0), CellKey(0, 41, 0)])


def test_the_collator_takes_keys_from_cells_and_numbers_those_without(tokenizer):
    cells = random_cells(4, np.random.default_rng(3))
    keyed = [{"input_ids": cell, "cell_key": [0, i, 9]} for i, cell in enumerate(cells)]
    first, again = DataCollatorForMaskedGenes(tokenizer)(keyed), DataCollatorForMaskedGenes(tokenizer)(keyed[::-1])
    assert first["labels"][0].tolist()[:5] == again["labels"][3].tolist()[:5]
    collate = DataCollatorForMaskedGenes(tokenizer, mask_probability=0.5)
    plain = [{"input_ids": cell} for cell in cells]
    assert not bool((collate(plain)["labels"] == collate(plain)["labels"]).all())
    padded = DataCollatorForMaskedGenes(tokenizer, pad_to_multiple_of=16)(keyed)
    assert padded["input_ids"].shape[1] % 16 == 0
    with pytest.raises(SettingError, match="layout 'flat' is not one of 'padded', 'packed'"):
        DataCollatorForMaskedGenes(tokenizer, layout="flat")
