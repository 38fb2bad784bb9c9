"""Properties that transformers asks of every model, for each of our classes: written anew, after what its common tests check."""

import copy

import pytest
import torch

from geneformer_hf import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
)
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

CLASSES = {
    "encoder": (GeneformerModel, {}),
    "masked_genes": (GeneformerForMaskedLM, {}),
    "cells": (GeneformerForSequenceClassification, {"num_labels": 3}),
    "genes": (GeneformerForTokenClassification, {"num_labels": 3}),
    "several_tasks": (GeneformerForMultiTaskClassification, {"task_labels": {"a": ["x", "y"], "b": ["u", "v", "w"]}}),
}
LENGTHS = (9, 5, 7)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


def build(kind, tokenizer, *, seed=0, **overrides):
    cls, options = CLASSES[kind]
    torch.manual_seed(seed)
    return cls(tiny_config(tokenizer, **options, **overrides)).eval()


@pytest.fixture
def model(kind, tokenizer):
    return build(kind, tokenizer)


@pytest.fixture
def batch():
    """Three cells of different lengths, padded."""
    torch.manual_seed(1)
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    ids = torch.randint(4, 64, mask.shape) * mask
    ids[:, 0] = 2
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(kind, batch):
    if kind == "masked_genes":
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if kind == "genes":
        return (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    return torch.tensor([[0, 1], [1, 2], [0, 0]]) if kind == "several_tasks" else torch.tensor([0, 1, 2])


def main_output(outputs):
    """Logits or hidden states; those of several tasks laid end to end."""
    found = outputs["last_hidden_state"] if "last_hidden_state" in outputs else outputs["logits"]
    return torch.cat([*found.values()] if isinstance(found, dict) else [*found], dim=-1) if not isinstance(found, torch.Tensor) else found


def run(model, batch, **more):
    with torch.no_grad():
        return main_output(model(**batch, **more))


def real(found, batch):
    """Outputs of positions that are no pads; of cells where there is one for each."""
    return found[batch["attention_mask"].bool()] if found.dim() == 3 and found.shape[:2] == batch["input_ids"].shape else found


def test_saved_and_opened_again_it_is_the_same(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(run(model, batch), run(again.eval(), batch))


def test_outputs_as_a_tuple_are_those_by_name(model, batch):
    with torch.no_grad():
        by_name, as_tuple = model(**batch), model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    first = as_tuple[0]
    expected = by_name["last_hidden_state"] if "last_hidden_state" in by_name else by_name["logits"]
    pairs = zip(first, expected, strict=True) if isinstance(first, (tuple, list)) else [(first, expected)]
    assert all(torch.equal(one, two) for one, two in pairs if isinstance(one, torch.Tensor))


def test_hidden_states_and_attentions_have_one_entry_a_layer(model, batch):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    n, length = batch["input_ids"].shape
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(n, length, 16)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(n, 2, length, length)] * 3
    for weights in outputs.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(n, 2, length), atol=1e-5)
        assert weights.masked_select(batch["attention_mask"][:, None, None, :].expand_as(weights) == 0).abs().max() < 1e-6


def test_gradients_of_hidden_states_and_attentions_are_kept(kind, model, batch):
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = [outputs.hidden_states[0], outputs.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    main_output(outputs).flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)


def test_attention_functions_agree(model, batch):
    model.set_attn_implementation("eager")
    eager = run(model, batch)
    model.set_attn_implementation("sdpa")
    assert torch.allclose(real(run(model, batch), batch), real(eager, batch), **CLOSE)


def test_pads_change_nothing(model, batch):
    whole = run(model, batch)
    for row, length in enumerate(LENGTHS):
        alone = run(model, {name: values[row : row + 1, :length] for name, values in batch.items()})
        expected = whole[row : row + 1, :length] if whole.dim() == 3 else whole[row : row + 1]
        assert torch.allclose(alone, expected, **CLOSE)


def test_embeddings_may_be_given_in_the_place_of_ids(model, batch):
    given = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    if type(model) in (GeneformerForSequenceClassification, GeneformerForMultiTaskClassification):
        # Their pooling needs to know which positions are genes; the first position needs nothing.
        assert model.config.pooling == "first"
    assert torch.allclose(run(model, given), run(model, batch), **CLOSE)


def test_gradient_checkpointing_by_the_configuration_gives_the_same_gradients(kind, tokenizer, batch):
    gradients = []
    for on in (False, True):
        model = build(kind, tokenizer, gradient_checkpointing=on, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        assert model.is_gradient_checkpointing == on
        (main_output(model(**batch)).float() ** 2).sum().backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(one, gradients[1][name], **CLOSE) for name, one in gradients[0].items())


def test_a_step_of_training_lowers_the_loss_and_reaches_every_weight(kind, model, batch):
    if kind == "encoder":
        pytest.skip("the encoder has no loss")
    model.train()
    optimizer, labels = torch.optim.AdamW(model.parameters(), lr=1e-2), labels_of(kind, batch)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        assert not without
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_vocabulary_can_be_resized(model, batch):
    before = run(model, batch)
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model.get_input_embeddings().weight.shape[0] == 70
    after = run(model, batch)
    if type(model) is GeneformerForMaskedLM:
        assert after.shape[-1] == 70
        after = after[..., :64]
    assert torch.allclose(real(after, batch), real(before, batch), **CLOSE)
    beyond = batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == batch["input_ids"].max(), 69)}
    assert torch.isfinite(run(model, beyond)).all()


def test_feed_forward_in_chunks_is_the_same(kind, tokenizer, batch):
    whole = build(kind, tokenizer)
    chunked = build(kind, tokenizer, chunk_size_feed_forward=1)
    chunked.load_state_dict(whole.state_dict())
    assert torch.allclose(run(chunked, batch), run(whole, batch), **CLOSE)


def test_a_model_can_be_copied_and_put_in_another_type(model, batch):
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, batch), run(model, batch))
    half = run(twin.to(torch.bfloat16), batch)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(real(half, batch).float(), real(run(model, batch), batch), atol=0.1, rtol=0.1)


def test_the_same_seed_makes_the_same_weights(kind, tokenizer):
    one, two, other = (build(kind, tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_are_drawn_as_the_configuration_says(kind, tokenizer):
    model = build(kind, tokenizer, hidden_size=64, num_attention_heads=2, intermediate_size=128, initializer_range=0.5)
    for name, tensor in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            assert torch.isin(tensor, torch.tensor([0.0, 1.0])).all(), name
        elif tensor.numel() > 1000:
            assert tensor.std().item() == pytest.approx(0.5, rel=0.15), name


def test_torch_export_gives_the_same(model, batch):
    model.set_attn_implementation("sdpa")
    exported = torch.export.export(model, (), kwargs=batch, strict=False)
    with torch.no_grad():
        assert torch.allclose(real(main_output(exported.module()(**batch)), batch), real(run(model, batch), batch), **CLOSE)
