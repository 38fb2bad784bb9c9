"""Estimates of a scan against finite differences through plain passes with an attention mask, and against the scan itself."""

import numpy as np
import pytest
import torch

from geneformer_hf.models.first_order import ScanEstimate, Slope
from geneformer_hf.models.modeling_geneformer import GeneformerModel
from geneformer_hf.models.scan import CellScan
from tests.conftest import tiny_config

STEP, N_GENES, LAYERS = 1e-4, 12, 2
CLOSED = -1e9


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def setting(request, tokenizer):
    torch.manual_seed(0)
    model = GeneformerModel(tiny_config(tokenizer)).eval().double().requires_grad_(False)
    cell = torch.randperm(40)[:N_GENES] + 4
    first = int(request.param)
    cell = torch.cat([torch.tensor([2]), cell, torch.tensor([3])]) if first else cell
    return model, cell, first, torch.randn(16, dtype=torch.float64)


def plain(model, entered, mask):
    """Return the states after LAYERS layers, by the model's own layers with a mask added to the scores of each query and key."""
    hidden = entered[None]
    for layer in model.encoder.layer[:LAYERS]:
        hidden = layer(hidden, attention_mask=mask[None, None])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden[0]


def estimate(setting, *, to_top, only_first, anchors=3):
    model, cell, first, _ = setting
    with torch.no_grad():
        scan = CellScan(model, cell, first_gene=first, to_top=to_top)
    return ScanEstimate(scan, n_genes=N_GENES, n_layers=LAYERS, anchors=anchors, only_first=only_first)


def readout_of(setting, only_first):
    _, cell, first, direction = setting

    def readout(hidden_xe, weight_x):
        if only_first:
            return (torch.nn.functional.normalize(hidden_xe[0], dim=0) @ direction)[None]
        counted = torch.cat([torch.arange(first, first + N_GENES), torch.arange(len(cell), len(hidden_xe))])
        pooled = weight_x[counted] @ hidden_xe[counted] / weight_x[counted].sum()
        return (torch.nn.functional.normalize(pooled, dim=0) @ direction)[None]

    return readout


@pytest.mark.parametrize("only_first", [False, True], ids=["mean", "first"])
@pytest.mark.parametrize("to_top", [False, True], ids=["deleted", "to_the_top"])
@torch.no_grad()
def test_slopes_are_finite_differences(setting, to_top, only_first):
    model, cell, first, _ = setting
    readout, path = readout_of(setting, only_first), estimate(setting, to_top=to_top, only_first=only_first)
    (slope,) = path.slopes(readout)
    length, at_top = len(cell), first + N_GENES // 2
    places = torch.arange(length)
    behind = places >= first + N_GENES
    before = (places + ((places >= first) & ~behind).long()).clamp(max=length - 1) if to_top else places
    after = places if to_top else (places - 1).clamp(min=0)

    def embed(positions):
        return model.embeddings(input_ids=cell[None], position_ids=positions[None])[0]

    before, after, top = embed(before), embed(after), embed(torch.full_like(places, first))
    middle = (before + after) / 2
    middle[:first], middle[behind] = before[:first], after[behind]
    if to_top:
        middle[at_top] = top[at_top]

    def value(entered, mask=None, ghost=None):
        """The readout, with a ghost of weight STEP behind all tokens if there is one."""
        n = len(entered) + (ghost is not None)
        scores = torch.zeros(n, n, dtype=torch.float64)
        scores[:, : len(entered)] = 0 if mask is None else mask
        weights = torch.ones(n, dtype=torch.float64)
        if mask is not None:
            weights[: len(entered)] = mask.exp()
        if ghost is not None:
            # All others hardly see it; it sees itself where the one at the top was, and not where it was itself.
            scores[:-1, -1], weights[-1] = np.log(STEP), STEP
            scores[-1, [at_top, first + ghost]] = CLOSED
            entered = torch.cat([entered, top[first + ghost][None]])
        hidden = plain(model, entered, scores)
        return float(readout(hidden[:1] if only_first else hidden, weights))

    whole = value(middle)
    for gene in (0, 3, 6, 11):
        step = torch.zeros_like(middle)
        step[first + gene] = STEP * (before - after)[first + gene]
        moved = 0 if to_top and gene == N_GENES // 2 else (value(middle + step) - value(middle - step)) / (2 * STEP)
        assert slope.along_c[gene + 1] - slope.along_c[gene] == pytest.approx(moved, abs=1e-5)
        mask = torch.zeros(length, dtype=torch.float64)

        def closed(place, mask=mask):
            mask = mask.clone()
            mask[place] = np.log1p(-STEP)
            return (value(middle, mask) - whole) / STEP

        expected = 0.0 if to_top and gene == N_GENES // 2 else closed(first + gene)
        if to_top:
            expected += closed(at_top) + (value(middle, ghost=gene) - whole) / STEP
        assert slope.own_m[gene] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("only_first", [False, True], ids=["mean", "first"])
@torch.no_grad()
def test_anchors_are_exact_and_the_last_one_is_the_cell(setting, only_first):
    model, cell, first, _ = setting
    path = estimate(setting, to_top=False, only_first=only_first, anchors=2)
    whole = plain(model, model.embeddings(input_ids=cell[None])[0], torch.zeros(len(cell), len(cell), dtype=torch.float64))
    torch.testing.assert_close(path.original_states, whole[:1] if only_first else whole, atol=1e-9, rtol=0)
    positions = torch.arange(len(cell)) - 1
    positions[: first or 1] = 0
    off = plain(model, model.embeddings(input_ids=cell[None], position_ids=positions[None])[0], torch.zeros(len(cell), len(cell), dtype=torch.float64))
    torch.testing.assert_close(path.anchor_states[0], off[:1] if only_first else off, atol=1e-9, rtol=0)


def test_between_places_a_slope_says_what_happens_and_at_them_the_exact_value():
    slope = Slope(along_c=np.array([0.0, 1, 1, 1, 5]), own_m=np.array([0.0, 0, 10, 0]))
    found = slope.values(np.array([0, 2, 4]), np.array([0.0, 1, 3]))
    # Off by nothing at 0 and 2, by -2 at 4; genes lie half way between.
    np.testing.assert_allclose(found, [0.5, 1, 10 + 0.5, (0 + 3) / 2])
