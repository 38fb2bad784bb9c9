import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

import geneformer_hf as gf
from geneformer_hf.models.configuration_geneformer import PRESETS
from tests.conftest import tiny_config
from tests.tolerances import LOSS

HEADS = [gf.GeneformerForMaskedLM, gf.GeneformerForSequenceClassification, gf.GeneformerForTokenClassification, gf.GeneformerModel]
TASKS = {"task_labels": {"cell type": ["B", "T", "NK"], "disease": ["no", "yes"]}}
PARAMETERS = {"gf-6L-30M-i2048": 10.29, "gf-12L-30M-i2048": 39.59, "gf-12L-95M-i4096": 38.00, "gf-12L-95M-i4096-CLcancer": 38.00, "gf-20L-95M-i4096": 151.3,
              "Geneformer-V1-10M": 10.29, "Geneformer-V2-104M": 104.39, "Geneformer-V2-104M_CLcancer": 104.39, "Geneformer-V2-316M": 316.35}  # fmt: skip


@pytest.fixture
def batch(tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tokenizer), (4, 12), generator=generator)
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 9, 12)):
        ids[row, length - 1] = 3
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_shape_has_its_number_of_parameters(name):
    with torch.device("meta"):
        model = gf.GeneformerForMaskedLM(gf.GeneformerConfig.from_preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)
    v2 = model.config.vocab_size == 20_275
    assert (model.config.cls_token_id, model.config.eos_token_id) == ((2, 3) if v2 else (None, None))
    assert model.config.hidden_size // model.config.num_attention_heads == 64


def test_an_unknown_shape_lists_the_known():
    with pytest.raises(ValueError, match=r"'gf-7L' is not a published shape\. Known: gf-6L"):
        gf.GeneformerConfig.from_preset("gf-7L")


@pytest.mark.parametrize(
    ("auto", "cls"),
    [
        (AutoModel, gf.GeneformerModel),
        (AutoModelForMaskedLM, gf.GeneformerForMaskedLM),
        (AutoModelForSequenceClassification, gf.GeneformerForSequenceClassification),
        (AutoModelForSequenceClassification, gf.GeneformerForMultiTaskClassification),
        (AutoModelForTokenClassification, gf.GeneformerForTokenClassification),
    ],
)
def test_auto_classes_give_back_what_was_saved(auto, cls, tokenizer, batch, tmp_path):
    torch.manual_seed(0)
    model = cls(tiny_config(tokenizer, **TASKS)).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is gf.GeneformerConfig
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is cls
    assert again.config.task_labels == TASKS["task_labels"]
    for a, b in zip(model(**batch).to_tuple(), again(**batch).to_tuple(), strict=True):
        if isinstance(a, tuple):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert torch.equal(a, b)


def test_logits_equal_plain_bert_bit_for_bit(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    plain = BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    labels = batch["input_ids"]
    trained = copy.deepcopy(model).train()
    assert trained(**batch, labels=labels).logits is None
    assert trained(**batch, labels=labels, full_logits=True).logits.shape == (4, 12, model.config.vocab_size)
    assert model(**batch, labels=labels).logits.shape == (4, 12, model.config.vocab_size)


def test_a_published_bert_folder_opens_directly(tokenizer, batch, tmp_path):
    shape = {
        k: getattr(tiny_config(tokenizer), k)
        for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_act")
    }
    plain = BertForMaskedLM(BertConfig(**shape)).eval()
    plain.save_pretrained(tmp_path)
    ours = gf.GeneformerForMaskedLM.from_pretrained(tmp_path).eval()
    assert ours.config.model_type == "geneformer"
    assert torch.equal(ours(**batch).logits, plain(**batch).logits)


def test_the_sparse_head_gives_the_loss_and_gradients_of_the_full_one(model, batch):
    labels = torch.where(torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.3, batch["input_ids"], -100)
    plain = BertForMaskedLM(BertConfig(**{k: v for k, v in model.config.to_dict().items() if k in BertConfig().to_dict() and k != "model_type"}))
    plain.load_state_dict(model.state_dict())
    for m in (plain, ours := copy.deepcopy(model)):
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        m.config.attention_probs_dropout_prob = 0.0
        m.train()
    expected, got = plain(**batch, labels=labels).loss, ours(**batch, labels=labels).loss
    assert got.item() == pytest.approx(expected.item(), abs=LOSS * 10)
    expected.backward()
    got.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def labels_for(cls, batch):
    generator = torch.Generator().manual_seed(2)
    if cls is gf.GeneformerForMaskedLM:
        return torch.where(torch.rand(batch["input_ids"].shape, generator=generator) < 0.4, batch["input_ids"], -100)
    if cls is gf.GeneformerForTokenClassification:
        return torch.randint(0, 3, batch["input_ids"].shape, generator=generator).where(batch["attention_mask"].bool(), -100)
    if cls is gf.GeneformerForMultiTaskClassification:
        return torch.tensor([[0, 1], [2, -100], [1, 0], [-100, 1]])
    return torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("cls", [*HEADS[:3], gf.GeneformerForMultiTaskClassification])
def test_halves_of_a_batch_add_up_to_the_whole(cls, tokenizer, batch):
    """The loss of a step does not depend on how many forward passes it is cut into."""
    torch.manual_seed(0)
    model = cls(tiny_config(tokenizer, num_labels=3, **TASKS)).eval()
    labels = labels_for(cls, batch)
    items = (labels != -100).sum()
    whole = model(**batch, labels=labels).loss
    halves = [model(**{k: v[s] for k, v in batch.items()}, labels=labels[s], num_items_in_batch=items).loss for s in (slice(0, 1), slice(1, 4))]
    assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "plain"),
    [(gf.GeneformerForSequenceClassification, BertForSequenceClassification), (gf.GeneformerForTokenClassification, BertForTokenClassification)],
)
def test_losses_equal_plain_bert_without_accumulation(cls, plain, tokenizer, batch, tmp_path):
    torch.manual_seed(0)
    ours = cls(tiny_config(tokenizer, num_labels=3)).eval()
    ours.save_pretrained(tmp_path)
    theirs = plain.from_pretrained(tmp_path).eval()
    labels = labels_for(cls, batch)
    a, b = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    assert torch.equal(a.logits, b.logits)
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=LOSS)


@pytest.mark.parametrize(("num_labels", "labels"), [(1, [[0.5], [1.5], [-1.0], [2.0]]), (3, [[1.0, 0.0, 1.0]] * 4)], ids=["regression", "multi_label"])
def test_numbers_and_several_labels_at_once(num_labels, labels, tokenizer, batch, tmp_path):
    torch.manual_seed(0)
    ours = gf.GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=num_labels)).eval()
    ours.save_pretrained(tmp_path)
    theirs = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    target = torch.tensor(labels)
    assert ours(**batch, labels=target).loss.item() == pytest.approx(theirs(**batch, labels=target).loss.item(), abs=LOSS)


def test_a_real_trainer_logs_the_same_loss_with_accumulation(tokenizer, tmp_path):
    """Stock BERT multiplies losses and gradients by the number of accumulation steps."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": (ids := torch.randint(4, len(tokenizer), (10,), generator=generator)), "labels": torch.where(torch.arange(10) % 3 == i % 3, ids, -100)}
        for i in range(16)
    ]
    logs = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = gf.GeneformerForMaskedLM(tiny_config(tokenizer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        arguments = TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation, max_steps=2, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, train_sampling_strategy="sequential", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        logs.append([(float(entry["loss"]), float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 2
    # Trainer logs four significant digits.
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-3)


def test_mean_pooling_reads_genes_alone(tokenizer, batch):
    torch.manual_seed(0)
    model = gf.GeneformerForSequenceClassification(tiny_config(tokenizer, pooling="mean", num_labels=3)).eval()
    hidden = model.bert(**batch).last_hidden_state
    logits = []
    for row, length in enumerate((12, 7, 9, 12)):
        pooled = hidden[row, 1 : length - 1].mean(0)
        logits.append(model.classifier(torch.tanh(model.bert.pooler.dense(pooled))))
    torch.testing.assert_close(model(**batch).logits, torch.stack(logits), atol=1e-5, rtol=1e-5)


def test_pooling_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="pooling 'cls' needs a vocabulary with a <cls> token"):
        gf.GeneformerConfig(vocab_size=25_426, pooling="cls")
    with pytest.raises(ValueError, match="pooling 'max' is not one of"):
        gf.GeneformerConfig(pooling="max")
    with pytest.raises(ValueError, match=r"needs config\.task_labels"):
        gf.GeneformerForMultiTaskClassification(gf.GeneformerConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1))


def test_a_fresh_process_finds_the_auto_classes_after_the_import(model_folder):
    code = f"""
import geneformer_hf, sys
heavy = [name for name in ("anndata", "datasets", "peft", "scanpy") if name in sys.modules]
assert not heavy, heavy
from transformers import AutoModelForMaskedLM, AutoTokenizer
model, tokenizer = AutoModelForMaskedLM.from_pretrained({str(model_folder)!r}), AutoTokenizer.from_pretrained({str(model_folder)!r})
assert "cuda" not in str(model.device), model.device
print(type(model).__name__, type(tokenizer).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["GeneformerForMaskedLM", "GeneformerTokenizer"], done.stderr


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (gf.GeneformerModel, {}),
        (gf.GeneformerForMaskedLM, {}),
        (gf.GeneformerForSequenceClassification, {"num_labels": 3}),
        (gf.GeneformerForTokenClassification, {"num_labels": 2}),
        (gf.GeneformerForMultiTaskClassification, {"task_labels": {"a": ["x", "y"]}}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_gradient_checkpointing_of_the_configuration_is_in_force_and_each_head_has_one_encoder(cls, fields, tokenizer, monkeypatch):
    from transformers.models.bert import modeling_bert

    built = []
    real = modeling_bert.BertEncoder.__init__
    monkeypatch.setattr(modeling_bert.BertEncoder, "__init__", lambda self, config: (built.append(1), real(self, config))[1])
    config = tiny_config(tokenizer, **fields)
    config.gradient_checkpointing = True
    model = cls(config)
    assert len(built) == 1
    assert [layer.gradient_checkpointing for layer in model.base_model.encoder.layer] == [True] * 3
    batch = torch.tensor([[2, 5, 6, 7, 3]])
    model.train()
    outputs = model(batch)
    values = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    (values[0] if isinstance(values, tuple) else values).sum().backward()
    assert model.base_model.encoder.layer[0].output.dense.weight.grad is not None
