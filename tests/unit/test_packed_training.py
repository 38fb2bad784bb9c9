"""Packed cells, the head at hidden genes alone, and what else makes training cheap: the same numbers as one cell at a time."""

import copy

import numpy as np
import pytest
import torch

import geneformer_hf as gf
from geneformer_hf.data.collators import DataCollatorForMaskedGenes
from geneformer_hf.models.attention import PACKED_ATTENTION, _Padded, packed_attention
from geneformer_hf.models.modeling_geneformer import has_fused_loss
from tests import reference
from tests.conftest import tiny_config
from tests.tolerances import BF16, LOSS, SAME_MODEL

LENGTHS = (12, 60, 7, 33, 1)


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(4, 64, length), "cell_key": (0, i, 0)} for i, length in enumerate(LENGTHS)]


@pytest.fixture
def batches(tokenizer, cells):
    return {layout: DataCollatorForMaskedGenes(tokenizer, layout=layout, mask_probability=0.4)(cells) for layout in ("padded", "packed")}


def new_model(tokenizer, **config):
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return gf.GeneformerForMaskedLM(tiny_config(tokenizer, **(dropout | config))).train()


def loss_and_gradients(model, batch, **more):
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=LOSS * 10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=SAME_MODEL, rtol=SAME_MODEL, msg=lambda text, name=name: f"{name}: {text}")


def one_at_a_time(model, tokenizer, cells):
    collate = DataCollatorForMaskedGenes(tokenizer, mask_probability=0.4)
    rows = [collate([cell]) for cell in cells]
    model.zero_grad()
    loss = reference.masked_gene_loss(model, [(row["input_ids"][0].tolist(), row["labels"][0].tolist()) for row in rows])
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED_ATTENTION])
def test_loss_and_gradients_are_those_of_one_cell_at_a_time(tokenizer, cells, batches, layout, attention):
    if layout == "packed" and attention != PACKED_ATTENTION:
        return
    model = new_model(tokenizer)
    expected = one_at_a_time(model, tokenizer, cells)
    model.set_attn_implementation(attention)
    assert_same(loss_and_gradients(model, batches[layout]), expected)


def test_stock_attention_would_mix_packed_cells_and_is_refused(tokenizer, batches):
    """What the packed attention function is there for: with another one, position ids do not keep cells apart."""
    model = new_model(tokenizer).eval()
    without = {name: value for name, value in batches["packed"].items() if not name.startswith(("cu_seq", "max_length"))}
    mixed = model(**without).logits
    with pytest.raises(ValueError, match=r"packed cells, which the attention function 'sdpa' would mix. Call model.set_attn_implementation\('packed_cells'\)"):
        model(**batches["packed"])
    model.set_attn_implementation(PACKED_ATTENTION)
    assert (model(**batches["packed"]).logits - mixed).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"cu_seq_lens_q ends at 112, and there are 113 tokens"):
        model(**batches["packed"] | {"cu_seq_lens_q": torch.tensor([0, 112], dtype=torch.int32)})


def test_hidden_states_of_packed_cells_are_their_own(tokenizer, cells, batches):
    model = new_model(tokenizer).eval()
    model.set_attn_implementation(PACKED_ATTENTION)
    packed = batches["packed"]
    together = model(**{k: v for k, v in packed.items() if k != "labels"}, output_hidden_states=True).hidden_states[-1][0]
    for start, stop in zip(packed["cu_seq_lens_q"].tolist(), packed["cu_seq_lens_q"].tolist()[1:], strict=False):
        alone = reference.hidden_states(model, packed["input_ids"][0, start:stop].tolist(), -1)
        torch.testing.assert_close(together[start:stop], alone, atol=SAME_MODEL, rtol=SAME_MODEL)


def test_calls_with_an_attention_mask_are_bit_equal_to_stock_attention(tokenizer, batches):
    model = new_model(tokenizer).eval()
    expected = model(**batches["padded"]).logits
    model.set_attn_implementation(PACKED_ATTENTION)
    assert torch.equal(model(**batches["padded"]).logits, expected)


def test_a_packed_call_with_a_mask_or_several_rows_is_refused(tokenizer, batches):
    model = new_model(tokenizer)
    model.set_attn_implementation(PACKED_ATTENTION)
    packed = batches["packed"]
    with pytest.raises(ValueError, match="packed cells come as one row without an attention mask; got 2 rows"):
        model(**{k: v.repeat(2, 1) if k in ("input_ids", "position_ids", "labels") else v for k, v in packed.items()})


def test_attention_dropout_is_applied_to_packed_cells(tokenizer, batches):
    model = new_model(tokenizer, attention_probs_dropout_prob=0.5)
    model.set_attn_implementation(PACKED_ATTENTION)
    torch.manual_seed(1)
    first, second = (float(model(**batches["packed"]).loss.detach()) for _ in range(2))
    torch.manual_seed(1)
    assert first != second
    assert float(model(**batches["packed"]).loss.detach()) == first


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_on_padded_queries_equals_cell_by_cell(dropout):
    """The way taken on an accelerator for single precision or dropout, run on the CPU."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(LENGTHS), 2 * 8) for _ in range(3))
    layout = _Padded(torch.tensor(LENGTHS), longest=max(LENGTHS))
    found = layout.attend(query, key, value, heads=2, dropout=dropout)
    heads = (x.view(1, -1, 2, 8).transpose(1, 2) for x in (query, key, value))
    borders = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    expected, _ = packed_attention(torch.nn.Module(), *heads, None, cu_seq_lens_q=borders)
    difference = (found.view(1, -1, 2, 8) - expected).abs().max()
    assert difference > 0.1 if dropout else difference < 1e-5


def test_the_head_at_hidden_genes_has_loss_and_gradients_of_the_whole_head(tokenizer, batches):
    model = new_model(tokenizer)
    sparse = loss_and_gradients(model, batches["padded"])
    assert_same(sparse, loss_and_gradients(model, batches["padded"], full_logits=True))
    assert model(**batches["padded"]).logits is None


def test_logits_at_labels_are_rows_of_all_logits(tokenizer, batches):
    model = new_model(tokenizer).eval()
    batch = batches["padded"]
    with torch.inference_mode():
        everywhere, there = model(**batch), model(**batch, full_logits=False)
    assert everywhere.logits.shape == (len(LENGTHS), max(LENGTHS), len(tokenizer))
    torch.testing.assert_close(there.logits, everywhere.logits[batch["labels"] != -100], atol=1e-5, rtol=1e-5)
    assert float(there.loss) == pytest.approx(float(everywhere.loss), abs=LOSS)


def test_the_fused_loss_equals_the_plain_one(tokenizer, batches):
    if not has_fused_loss():
        pytest.skip("this torch has no linear_cross_entropy")
    plain, fused = new_model(tokenizer), new_model(tokenizer)
    fused.fused_loss = True
    for model in (plain, fused):
        model.set_attn_implementation(PACKED_ATTENTION)
    assert_same(loss_and_gradients(fused, batches["packed"]), loss_and_gradients(plain, batches["packed"]))


def test_the_fused_loss_in_bf16_is_not_summed_in_bf16(tokenizer, cells):
    if not has_fused_loss():
        pytest.skip("this torch has no linear_cross_entropy")
    many = [cell | {"cell_key": (0, i, k)} for k in range(40) for i, cell in enumerate(cells)]
    batch = DataCollatorForMaskedGenes(tokenizer, layout="packed", mask_probability=0.4)(many)
    plain, fused = new_model(tokenizer), new_model(tokenizer)
    fused.fused_loss = True
    for model in (plain, fused):
        model.set_attn_implementation(PACKED_ATTENTION)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = loss_and_gradients(fused, batch), loss_and_gradients(plain, batch)
    assert found[0] == pytest.approx(expected[0], abs=5e-3)
    for name, gradient in expected[1].items():
        # A bias of keys has no influence on attention: its gradient is rounding alone.
        if name.endswith("key.bias"):
            continue
        assert float((found[1][name] - gradient).norm()) <= BF16 * float(gradient.norm()) + 1e-6, name


def test_recomputing_activations_changes_nothing(tokenizer, batches):
    plain, recomputing = new_model(tokenizer), new_model(tokenizer)
    recomputing.activation_checkpointing_enable()
    for model in (plain, recomputing):
        model.set_attn_implementation(PACKED_ATTENTION)
    assert_same(loss_and_gradients(recomputing, batches["packed"]), loss_and_gradients(plain, batches["packed"]))


def test_the_attention_function_is_not_saved_with_the_model(tokenizer, tmp_path):
    model = new_model(tokenizer)
    model.set_attn_implementation(PACKED_ATTENTION)
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    assert copy.deepcopy(gf.GeneformerForMaskedLM.from_pretrained(tmp_path)).config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packed_cells_on_a_gpu(tokenizer, batches, dropout):
    model = new_model(tokenizer, attention_probs_dropout_prob=dropout).to("cuda")
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in batches["packed"].items()}
    expected = float(new_model(tokenizer).eval()(**batches["padded"]).loss)
    with torch.autocast("cuda", torch.bfloat16):
        assert float(model.eval()(**batch).loss) == pytest.approx(expected, abs=0.1)
    assert float(model(**batch).loss) == pytest.approx(expected, abs=1e-3)
