"""Pooling: padded and packed against a loop over cells; specials and pads never count."""

import pytest
import torch

from geneformer_hf import GeneformerConfig, GeneformerForMultiTaskClassification, GeneformerForSequenceClassification
from geneformer_hf.models.pooling import GeneAttention, pool_cells
from tests.conftest import tiny_config
from tests.tolerances import LOSS, SAME_MODEL

CELLS = [[2, 9, 8, 7, 3], [2, 30, 3], [2, 3], [2, 11, 12, 13, 14, 15, 16, 3]]


def laid_out(seed=0):
    torch.manual_seed(seed)
    longest = max(map(len, CELLS))
    ids = torch.tensor([cell + [0] * (longest - len(cell)) for cell in CELLS])
    hidden = torch.randn(len(CELLS), longest, 6)
    mask = (torch.arange(longest) < torch.tensor([[len(cell)] for cell in CELLS])).long()
    packed = torch.cat([hidden[i, : len(cell)] for i, cell in enumerate(CELLS)])[None]
    borders = torch.tensor([0, *torch.tensor([len(cell) for cell in CELLS]).cumsum(0).tolist()])
    return ids, hidden, mask, packed, torch.tensor([[token for cell in CELLS for token in cell]]), borders


@pytest.mark.parametrize("pooling", ["first", "cls", "mean", "attention"])
def test_padded_and_packed_are_the_naive_loop(pooling):
    ids, hidden, mask, packed, packed_ids, borders = laid_out()
    config = GeneformerConfig(vocab_size=40, cls_token_id=2, eos_token_id=3, pooling=pooling)
    attention = GeneAttention(6) if pooling == "attention" else None
    expected = []
    for i, cell in enumerate(CELLS):
        genes = hidden[i, 1 : len(cell) - 1]
        if pooling in ("first", "cls"):
            expected.append(hidden[i, 0])
        elif not len(genes):
            expected.append(torch.zeros(6))
        elif pooling == "mean":
            expected.append(genes.mean(0))
        else:
            expected.append((torch.softmax(genes @ attention.weigh.weight[0], 0)[:, None] * genes).sum(0))
    padded = pool_cells(hidden, ids, mask, None, config=config, attention=attention)
    together = pool_cells(packed, packed_ids, None, borders, config=config, attention=attention)
    torch.testing.assert_close(padded, torch.stack(expected), atol=SAME_MODEL, rtol=1e-5)
    torch.testing.assert_close(together, torch.stack(expected), atol=SAME_MODEL, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean", "attention"])
@pytest.mark.parametrize("several", [False, True], ids=["one_head", "heads"])
def test_loss_and_gradients_are_the_same_padded_and_packed(tokenizer, pooling, several):
    from geneformer_hf.data.collators import DataCollatorForCells

    heads = (
        {"task_labels": {"a": ["x", "y"], "b": ["1", "2", "3"]}, "task_class_weights": {"a": [0.5, 2.0]}}
        if several
        else {"num_labels": 3, "class_weights": [1.0, 2.0, 0.5]}
    )
    cls = GeneformerForMultiTaskClassification if several else GeneformerForSequenceClassification
    labels = [[0, 1], [1, 2], [-100, 0], [1, -100]] if several else [0, 1, 2, 1]
    cells = [{"input_ids": cell, "labels": label} for cell, label in zip(CELLS, labels, strict=True)]
    found = []
    for layout in ("padded", "packed"):
        torch.manual_seed(1)
        model = cls(
            tiny_config(
                tokenizer, pooling=pooling, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, problem_type="single_label_classification", **heads
            )
        )
        model.set_attn_implementation("packed_cells" if layout == "packed" else "sdpa")
        output = model(**DataCollatorForCells(tokenizer, layout=layout)(cells))
        output.loss.backward()
        found.append((output.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], abs=LOSS)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, atol=SAME_MODEL, rtol=1e-4, msg=name)


def test_packed_cells_are_refused_by_attention_that_would_mix_them(tokenizer):
    from geneformer_hf.data.collators import DataCollatorForCells

    model = GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=2))
    batch = DataCollatorForCells(tokenizer, layout="packed")([{"input_ids": cell, "label": 0} for cell in CELLS])
    with pytest.raises(ValueError, match="packed cells, which the attention function 'sdpa' would mix"):
        model(**batch)


def test_class_weights_against_the_loop(tokenizer):
    torch.manual_seed(0)
    model = GeneformerForSequenceClassification(
        tiny_config(tokenizer, num_labels=3, problem_type="single_label_classification", class_weights=[1.0, 3.0, 0.5])
    ).eval()
    ids, labels = torch.tensor([[2, 9, 8, 3], [2, 9, 7, 3]]), torch.tensor([1, 2])
    output = model(input_ids=ids, labels=labels)
    each = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
    assert output.loss.item() == pytest.approx(((3.0 * each[0] + 0.5 * each[1]) / 2).item(), abs=LOSS)
    half = model(input_ids=ids, labels=labels, num_items_in_batch=4)
    assert half.loss.item() == pytest.approx(output.loss.item() / 2, abs=LOSS)
