"""What a change does to the ranking of a cell; hidden states of variants against explicit passes."""

import numpy as np
import pytest
import torch

from geneformer_hf import Perturbation
from geneformer_hf.analysis.perturbation_plan import count_genes
from geneformer_hf.analysis.perturbations import KINDS, Change, changed
from geneformer_hf.errors import SettingError
from geneformer_hf.models import scan as scan_module
from geneformer_hf.models.attention import encode_packed
from geneformer_hf.models.modeling_geneformer import GeneformerModel
from geneformer_hf.models.scan import CellScan
from tests.conftest import tiny_config
from tests.tolerances import NAIVE_TWIN

GENES = np.array([50, 40, 30, 20, 10, 11, 12, 13])


@pytest.mark.parametrize(
    ("change", "after", "untouched"),
    [
        pytest.param(Change("delete", (30,)), [50, 40, 20, 10, 11, 12, 13], [1] * 7, id="deleted"),
        pytest.param(Change("delete", (13, 50)), [40, 30, 20, 10, 11, 12], [1] * 6, id="several_deleted"),
        pytest.param(Change("overexpress", (20,)), [20, 50, 40, 30, 10, 11, 12, 13], [0] + [1] * 7, id="moved_to_the_top"),
        pytest.param(Change("overexpress", (13, 40)), [13, 40, 50, 30, 20, 10, 11, 12], [0, 0] + [1] * 6, id="several_in_the_order_given"),
        pytest.param(Change("overexpress", (99,)), [99, 50, 40, 30, 20, 10, 11, 12], [0] + [1] * 7, id="not_expressed_and_the_last_falls_off"),
        pytest.param(Change("inhibit", (40,), quartiles=1), [50, 30, 20, 40, 10, 11, 12, 13], [1, 1, 1, 0, 1, 1, 1, 1], id="a_quarter_down"),
        pytest.param(Change("inhibit", (12,), quartiles=2), [50, 40, 30, 20, 10, 11, 13, 12], [1] * 7 + [0], id="no_further_than_the_end"),
        pytest.param(Change("inhibit", (50, 40), quartiles=3), [30, 20, 10, 11, 12, 13, 50, 40], [1] * 6 + [0, 0], id="several_down_keep_their_order"),
        pytest.param(Change("activate", (12,), quartiles=2), [50, 40, 12, 30, 20, 10, 11, 13], [1, 1, 0, 1, 1, 1, 1, 1], id="two_quarters_up"),
        pytest.param(Change("activate", (40, 30), rank=0), [40, 30, 50, 20, 10, 11, 12, 13], [0, 0] + [1] * 6, id="to_the_top_side_by_side"),
        pytest.param(Change("inhibit", (50,), rank=100), [40, 30, 20, 10, 11, 12, 13, 50], [1] * 7 + [0], id="to_a_rank_beyond_the_end"),
    ],
)
def test_the_ranking_after_a_change(change, after, untouched):
    found = changed(GENES, change, most=8)
    assert found.tokens.tolist() == after
    assert found.untouched.tolist() == [bool(u) for u in untouched]
    assert found.n_lost == (1 if 99 in after else 0)
    here = found.origin >= 0
    assert GENES[found.origin[here]].tolist() == found.tokens[here].tolist()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(Change("delete", (99,)), id="not_expressed"),
        pytest.param(Change("delete", (50, 99)), id="one_of_them_not_expressed"),
        pytest.param(Change("delete", tuple(GENES.tolist())), id="nothing_is_left"),
        pytest.param(Change("overexpress", (50,)), id="at_the_top_already"),
        pytest.param(Change("inhibit", (13,), quartiles=3), id="at_the_end_already"),
        pytest.param(Change("activate", (40,), rank=5), id="higher_already"),
        pytest.param(Change("activate", (99,), rank=0), id="cannot_be_shifted_without_being_expressed"),
    ],
)
def test_changes_that_cannot_be_made(change):
    assert changed(GENES, change, most=8) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_a_scan_counts_what_can_be_changed(kind, n):
    genes = GENES[:n]
    for shift in [{}] if kind in ("delete", "overexpress") else [{}, {"quartiles": 3}, {"rank": 2}]:
        every = Perturbation.every(kind, **shift)
        possible = sum(changed(genes, change, most=8) is not None for change in every.of(genes))
        assert count_genes(genes, every) == possible


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "knockdown", "genes": ("a",)}, "kind is 'knockdown'; expected delete, overexpress, inhibit, activate"),
        ({"kind": "delete", "genes": ()}, r"there are no genes; for one change per gene use Perturbation\.each"),
        ({"kind": "delete", "genes": ("a", "b", "a")}, "genes are named twice: a"),
        ({"kind": "delete", "genes": ("a",), "quartiles": 1}, "quartiles and rank are for inhibit and activate, and kind is delete"),
        ({"kind": "inhibit", "genes": ("a",), "quartiles": 1, "rank": 5}, "give quartiles or rank, not both"),
        ({"kind": "inhibit", "genes": ("a",), "quartiles": 4}, "quartiles is 4; expected 1, 2 or 3"),
        ({"kind": "activate", "genes": ("a",), "rank": -1}, "rank is -1; expected a whole number, 0 for the top"),
    ],
)
def test_perturbations_that_cannot_be_used(settings, message):
    with pytest.raises(SettingError, match=message):
        Perturbation(**settings)


def test_pairs_and_anchors_come_with_their_single_genes():
    assert [p.genes for p in Perturbation.pairs("delete", ["a", "b", "c"])] == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
    assert [p.genes for p in Perturbation.with_anchor("delete", "x", ["a", "x", "b"])] == [("x",), ("a",), ("b",), ("x", "a"), ("x", "b")]


@pytest.mark.parametrize("specials", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("to_top", [False, True], ids=["deleted", "moved_to_the_top"])
@pytest.mark.parametrize("queries", [256, 7], ids=["one_block", "blocks"])
def test_the_shared_first_layer_equals_variants_one_by_one(tokenizer, specials, to_top, queries, monkeypatch):
    monkeypatch.setattr(scan_module, "QUERIES_AT_ONCE", queries)
    torch.manual_seed(0)
    model = GeneformerModel(tiny_config(tokenizer, initializer_range=0.3)).eval()
    cell = torch.randperm(40)[:30] + 4
    first = int(specials)
    cell = torch.cat([torch.tensor([2]), cell, torch.tensor([3])]) if specials else cell
    scan = CellScan(model, cell, first_gene=first, to_top=to_top)
    for ranks in (range(16), [16], range(17, 30), [0, 3, 4, 11, 29], [2, 28]):
        positions = [first + rank for rank in ranks]
        with torch.inference_mode():
            layer = scan.first_layer(positions)
            found = torch.cat([layer.states(slice(i, i + 3)) for i in range(0, len(positions), 3)])
            for states, p in zip(found, positions, strict=True):
                rest = torch.cat([cell[:p], cell[p + 1 :]])
                tokens = torch.cat([rest[:first], cell[p : p + 1], rest[first:]]) if to_top else rest
                torch.testing.assert_close(states, encode_packed(model, tokens, [len(tokens)], 1), atol=NAIVE_TWIN, rtol=0)


def test_sums_that_vanish_are_told(tokenizer):
    """One key takes all the weight of the others: without it, what is left of the sums is not to be trusted."""
    torch.manual_seed(0)
    model = GeneformerModel(tiny_config(tokenizer)).eval()
    with torch.no_grad():
        for name in ("query", "key"):
            getattr(model.encoder.layer[0].attention.self, name).weight.mul_(400)
    cell = torch.arange(4, 24)
    with torch.inference_mode():
        assert CellScan(model, cell, first_gene=0, to_top=False).first_layer(list(range(16))) is None
