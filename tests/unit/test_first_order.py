"""First-order estimates against finite differences through plain passes."""

import pytest
import torch

from geneformer_hf.models.first_order import first_order
from geneformer_hf.models.modeling_geneformer import GeneformerModel
from tests.conftest import tiny_config

STEP = 1e-3


@pytest.fixture(scope="module")
def setting(tokenizer):
    torch.manual_seed(0)
    model = GeneformerModel(tiny_config(tokenizer, initializer_range=0.2)).eval().double()
    cell = torch.cat([torch.tensor([2]), torch.randperm(40)[:12] + 4, torch.tensor([3])])
    direction = torch.randn(16, dtype=torch.float64)
    return model, cell, direction


def readout(model, cell, direction, *, positions=None, gate=None):
    """The mean over genes in a direction, by a plain pass: position embeddings and the weight of each key as given."""
    embeddings = model.embeddings
    table = embeddings.position_embeddings.weight
    entered = embeddings.word_embeddings(cell) + embeddings.token_type_embeddings.weight[0] + (table[: len(cell)] if positions is None else positions)
    mask = torch.zeros(len(cell), dtype=torch.float64) if gate is None else gate.log()
    hidden = embeddings.LayerNorm(entered)[None]
    for layer in model.encoder.layer[:2]:
        hidden = layer(hidden, attention_mask=mask.expand(1, 1, len(cell), len(cell)))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    weights = torch.ones(len(cell), dtype=torch.float64) if gate is None else gate
    genes = slice(1, len(cell) - 1)
    return float((hidden[0, genes] * weights[genes, None]).sum(0) @ direction / weights[genes].sum())


def estimate(model, cell, direction):
    def readouts(hidden, weights):
        genes = slice(1, len(cell) - 1)
        return ((hidden[genes] * weights[genes, None]).sum(0) @ direction / weights[genes].sum())[None]

    return first_order(model, cell, first_gene=1, n_genes=len(cell) - 2, n_layers=2, readouts=readouts)


@torch.no_grad()
def test_deleting_is_closing_a_gate_and_moving_the_rest_up(setting):
    model, cell, direction = setting
    found = estimate(model, cell, direction)
    whole = readout(model, cell, direction)
    assert float(found.values_k[0]) == pytest.approx(whole, abs=1e-9)
    table = model.embeddings.position_embeddings.weight[: len(cell)]
    for gene in (0, 5, 11):
        place = gene + 1
        gate, positions = torch.ones(len(cell), dtype=torch.float64), table.clone()
        gate[place] = 1 - STEP
        positions[place + 1 :] += STEP * (table[place:-1] - table[place + 1 :])
        changed = readout(model, cell, direction, positions=positions, gate=gate)
        assert float(found.deleted_km[0, gene]) == pytest.approx((changed - whole) / STEP, rel=2e-2, abs=1e-5)


@torch.no_grad()
def test_moving_to_the_top_moves_those_before_down(setting):
    model, cell, direction = setting
    found = estimate(model, cell, direction)
    whole = readout(model, cell, direction)
    table = model.embeddings.position_embeddings.weight[: len(cell)]
    for gene in (1, 6, 11):
        place, positions = gene + 1, table.clone()
        positions[1:place] += STEP * (table[2 : place + 1] - table[1:place])
        positions[place] += STEP * (table[1] - table[place])
        changed = readout(model, cell, direction, positions=positions)
        assert float(found.to_top_km[0, gene]) == pytest.approx((changed - whole) / STEP, rel=2e-2, abs=1e-5)
    assert float(found.to_top_km[0, 0]) == 0
