"""Pretraining: the same numbers whatever the batches, evaluation against naive loops, what the final folder holds, continual learning."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, set_seed

import geneformer_hf as gf
from geneformer_hf.data.masking import CellKey, GeneMasker
from geneformer_hf.data.mixtures import EVALUATION, Corpus, Mixture
from geneformer_hf.errors import GeneformerError
from geneformer_hf.reports.metrics import MaskedGeneScores
from geneformer_hf.training.starting import freeze
from geneformer_hf.training.trainer import GeneformerPretrainer
from tests import reference
from tests.tolerances import BF16_TRAJECTORY, LOSS, TRAJECTORY
from tests.training.conftest import NO_DROPOUT, losses, make_tokens, norms


@pytest.mark.parametrize(
    "settings_of_batches",
    [
        pytest.param({"batch_layout": "padded", "group_by_length": False}, id="padded"),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, id="one_cell_at_a_time"),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "batch_layout": "padded", "group_by_length": False}, id="padded_accumulated"
        ),
        pytest.param({"gradient_checkpointing": True}, id="activations_recomputed"),
        pytest.param({"fused_loss": True}, id="fused_loss"),
        pytest.param({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, id="two_loader_workers"),
    ],
)
def test_the_same_trajectory_however_cells_are_batched(run, settings_of_batches):
    expected = run("reference")
    found = run("found", **settings_of_batches)
    assert len(losses(expected)) == 24
    np.testing.assert_allclose(losses(found), losses(expected), atol=TRAJECTORY)
    np.testing.assert_allclose(norms(found), norms(expected), atol=TRAJECTORY * 10)
    assert found.figures["held_out"]["cells"]["after"]["loss"] == pytest.approx(expected.figures["held_out"]["cells"]["after"]["loss"], abs=TRAJECTORY)


@pytest.mark.parametrize(
    "budget", [pytest.param({"max_tokens_per_batch": 200}, id="packed"), pytest.param({"max_tokens_per_batch": 200, "batch_layout": "padded"}, id="padded")]
)
def test_batches_of_tokens_have_the_loss_of_one_cell_at_a_time(run, tokens, tokenizer, budget, tmp_path):
    """The plan differs from that of cells, so the first step is compared with its cells run alone."""
    found = run("found", **budget, max_steps=1, num_train_epochs=1)
    arguments = gf.GeneformerPretrainingArguments(output_dir=str(tmp_path / "unused"), use_cpu=True, **budget)
    corpus = Corpus("cells", tokens, 10)
    torch.manual_seed(arguments.seed)
    trainer = GeneformerPretrainer(found.model, arguments, mixture=Mixture([corpus], seed=arguments.order_seed), tokenizer=tokenizer)
    (batch,) = next(iter(trainer.plan.steps()))
    set_seed(arguments.seed)
    fresh = gf.GeneformerForMaskedLM(found.model.config).train()
    masker = GeneMasker(tokenizer, seed=arguments.order_seed)
    cells = []
    for key in batch:
        cell = np.array(tokens[key.row]["input_ids"])
        ids, labels = masker.hide(cell, np.array([len(cell)]), [key])
        cells.append((ids.tolist(), labels.tolist()))
    assert losses(found)[0] == pytest.approx(float(reference.masked_gene_loss(fresh, cells).detach()), abs=TRAJECTORY)


def test_bf16_stays_close_to_single_precision(run):
    np.testing.assert_allclose(losses(run("bf16", bf16=True)), losses(run("reference")), atol=BF16_TRAJECTORY)


@pytest.mark.slow
# torch's compiler warns of itself (TorchScript, gradients of inner tensors), and takes a warning turned into an error for its own failure.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_compiled_training_has_the_same_trajectory(run, layout):
    more = {"batch_layout": layout} | ({"group_by_length": False} if layout == "padded" else {})
    expected = run("reference", max_steps=6, **more)
    np.testing.assert_allclose(losses(run("compiled", max_steps=6, torch_compile=True, **more)), losses(expected), atol=TRAJECTORY)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run):
    first, again, other = run("a"), run("b"), run("c", seed=7)
    assert all(torch.equal(x, y) for x, y in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    assert losses(first) != losses(other)


def test_figures_of_held_out_cells_equal_the_naive_loop(run, tokens, tokenizer):
    found = run(num_train_epochs=1)
    corpus = Corpus("cells", tokens, 10)
    masker, model = GeneMasker(tokenizer, seed=42), found.model.cpu().eval()
    nll, first, ten, there = [], 0, 0, []
    for row in corpus.held_out_rows.tolist():
        cell = np.array(tokens[row]["input_ids"])
        ids, labels = masker.hide(cell, np.array([len(cell)]), [CellKey(0, row, EVALUATION)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids[None])).logits[0]
        for place in np.flatnonzero(labels != -100):
            nll.append(-float(torch.log_softmax(logits[place], 0)[labels[place]]))
            there += [nll[-1]] if ids[place] == 1 else []
            rank = int((logits[place] > logits[place][labels[place]]).sum())
            first, ten = first + (rank == 0), ten + (rank < 10)
    after = found.figures["held_out"]["cells"]["after"]
    assert after["loss"] == pytest.approx(np.mean(nll), abs=LOSS * 10)
    assert after["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert (after["accuracy_top1"], after["accuracy_top10"]) == pytest.approx((first / len(nll), ten / len(nll)))
    assert after["loss_at_mask"] == pytest.approx(np.mean(there), abs=LOSS * 10)
    baselines = found.figures["held_out"]["cells"]["baselines"]
    assert (baselines["hidden_genes"], baselines["hidden_by_mask"]) == (len(nll), len(there))


def test_a_model_that_says_nothing_is_right_about_nothing():
    scores = MaskedGeneScores()
    scores.add(torch.zeros(5, 64), torch.arange(5), torch.tensor([True, True, False, True, False]))
    figures = scores.figures()
    assert (figures["loss"], figures["loss_at_mask"], figures["perplexity"]) == pytest.approx((np.log(64), np.log(64), 64), rel=1e-5)
    assert {value for name, value in figures.items() if "accuracy" in name} == {0.0}


def test_accuracy_in_bf16_is_not_lost_to_ties(tokenizer):
    """Scores of many genes are equal in half precision, so the head runs in single precision when it is judged."""
    torch.manual_seed(0)
    model = gf.GeneformerForMaskedLM(gf.GeneformerConfig(vocab_size=20_000, **NO_DROPOUT)).eval()
    batch = {"input_ids": torch.randint(4, 64, (4, 40))}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores = model(**batch, labels=batch["input_ids"], full_logits=False).logits
    assert scores.dtype == torch.float32
    assert len(scores[0].unique()) > 19_000


def test_the_model_learns_what_there_is_to_learn(run):
    found = run(num_train_epochs=30, learning_rate=1e-2, eval_strategy="epoch")
    after = found.figures["held_out"]["cells"]["after"]
    baselines = found.figures["held_out"]["cells"]["baselines"]
    assert after["loss"] < baselines["gene_frequency"] - 0.1
    assert after["loss"] < baselines["rank_frequency"]
    assert after["loss_at_mask"] < baselines["rank_frequency_at_mask"]
    assert sum("eval_loss" in entry for entry in found.history) == 30


def test_the_final_folder_opens_with_auto_classes_and_says_what_it_is(run, tokenizer):
    found = run("pbmc model")
    model, reloaded = AutoModelForMaskedLM.from_pretrained(found.folder), AutoTokenizer.from_pretrained(found.folder)
    assert type(model) is gf.GeneformerForMaskedLM
    assert reloaded.gene_table.fingerprint == tokenizer.gene_table.fingerprint == model.config.vocabulary_fingerprint
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), found.model.cpu().state_dict().values(), strict=True))
    assert BertForMaskedLM.from_pretrained(found.folder) is not None
    names = {path.name for path in found.folder.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "gene_table.json",
        "figures.json",
        "history.json",
        "loss.png",
        "settings.yaml",
    }
    assert not any(name.endswith((".bin", ".pkl", ".pt")) for name in names)
    assert {path.stat().st_mode & 0o777 for path in found.folder.iterdir()} == {0o644}
    assert json.loads((found.folder / "figures.json").read_text()) == found.figures
    card = (found.folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(found.figures["held_out"]["cells"]["after"]["loss"], abs=1e-4)
    assert "| cells | 90 | 100.0% | 10 held-out cells |" in card
    assert "| cells | `<mask>` |" in card
    assert "learning_rate: 0.001" in card
    assert str(found.folder.parent) not in card


def test_nothing_held_out_means_no_figures_and_still_a_model(run):
    found = run(held_out=0, eval_strategy="epoch")
    assert found.figures["held_out"] == {}
    assert "None: no cells were held out." in (found.folder / "README.md").read_text()


def test_losses_go_to_the_tracker_that_is_asked_for(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(report_to=["tensorboard"], max_steps=3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "board").rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("train/loss")) == 3


def test_going_on_from_a_checkpoint_shows_what_was_learnt_and_forgotten(run, tokens, other_tokens):
    base = run("base", num_train_epochs=10, learning_rate=1e-2)
    tuned = run(
        "tuned", data={"new": other_tokens, "old": tokens}, from_checkpoint=str(base.folder), train_weights=[0.8, 0.2], num_train_epochs=8, learning_rate=5e-3
    )
    new, old = tuned.figures["held_out"]["new"], tuned.figures["held_out"]["old"]
    assert new["after"]["loss"] < new["before"]["loss"] - 0.1
    # The old domain keeps its held-out cells, so its loss before is that of the finished base model.
    assert old["before"]["loss"] == pytest.approx(base.figures["held_out"]["cells"]["after"]["loss"], abs=0.3)
    without = run(
        "without",
        data={"new": other_tokens, "old": tokens},
        from_checkpoint=str(base.folder),
        train_weights=[0.999, 0.001],
        num_train_epochs=8,
        learning_rate=5e-3,
    )
    assert old["after"]["loss"] < without.figures["held_out"]["old"]["after"]["loss"]
    assert "continued from base/model" in (tuned.folder / "README.md").read_text()
    assert tuned.history[0]["step"] == 0


def test_frozen_layers_and_embeddings_stay_as_they_are(run):
    base = run("base")
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    tuned = run("tuned", from_checkpoint=str(base.folder), freeze_layers=1, freeze_embeddings=True)
    after = tuned.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("bert.embeddings", "bert.encoder.layer.0.")) for name in moved)
    assert any(name.startswith("bert.encoder.layer.1.") for name in moved)


def test_a_model_of_ones_own_can_be_trained(run, tokenizer):
    torch.manual_seed(5)
    model = gf.GeneformerForMaskedLM(gf.GeneformerConfig.from_preset("gf-6L-30M-i2048", vocab_size=64, cls_token_id=2, eos_token_id=3, **NO_DROPOUT))
    freeze(model, layers=2)
    assert run(model=model).model is model


def test_several_corpora_without_weights_are_one(run, tokens):
    halves = {"a": tokens.select(range(50)), "b": tokens.select(range(50, 100))}
    found = run(data=halves, held_out=10)
    assert set(found.figures["held_out"]) == {"a", "b"}
    assert found.figures["steps"] == 20


def test_cells_of_ones_own_to_evaluate_on(run, tokens, other_tokens, tmp_path):
    narrow = other_tokens.cast_column("input_ids", datasets.List(datasets.Value("int32")))
    found = run(eval_data=narrow, held_out=0.5)
    assert found.figures["held_out"]["cells"]["cells"] == 60
    assert found.figures["steps"] == 2 * 13, "all 100 cells are trained on"
    tokens.save_to_disk(tmp_path / "train")
    other_tokens.save_to_disk(tmp_path / "other donors")
    again = run("again", data=False, train_data=[str(tmp_path / "train")], eval_paths=[str(tmp_path / "other donors")])
    assert again.figures["held_out"]["train"]["evaluated_on"] == "other donors"
    assert "| train | 100 | 100.0% | 60 cells of other donors |" in (again.folder / "README.md").read_text()
    assert again.figures["held_out"]["train"]["after"] == found.figures["held_out"]["cells"]["after"]


def test_corpora_whose_names_begin_alike(run, tokens, other_tokens):
    found = run(data={"cancer": tokens, "cancer_old": other_tokens}, max_steps=2)
    assert set(found.figures["held_out"]["cancer"]["after"]) == set(MaskedGeneScores().figures())


def test_datasets_to_evaluate_on_go_by_their_names(run, tokens, other_tokens):
    more = {"b": make_tokens(19, seed=3), "a": make_tokens(17, seed=4)}
    found = run(data={"a": tokens, "b": other_tokens}, eval_data=more, max_steps=2)
    assert [found.figures["held_out"][name]["cells"] for name in "ab"] == [17, 19]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda t, o: {"data": datasets.DatasetDict({"train": t, "test": o})}, r"This is a DatasetDict \(train, test\)"),
        (lambda t, o: {"data": {"a": t}, "eval_data": {"b": o}}, "expected the same names"),
        (lambda t, o: {"data": {"a": t, "b": t}}, "b to train on is the same dataset as a to train on"),
        (lambda t, o: {"eval_data": t}, "cells to evaluate on is the same dataset as cells to train on"),
        (lambda t, o: {"eval_data": t.select([])}, "no cells in it"),
        (lambda t, o: {"data": [1, 2]}, "cells is a list; expected a datasets.Dataset"),
        (lambda t, o: {"held_out": 1, "mask_probability": 0.01}, "too few to say anything"),
        (lambda t, o: {"data": t.map(lambda row: {"input_ids": [*row["input_ids"][:-1], 0, 3]})}, "holds pads"),
    ],
)
def test_data_that_would_mislead(run, tokens, other_tokens, data, message):
    with pytest.raises(GeneformerError, match=message):
        run(**data(tokens, other_tokens))


def test_a_model_of_no_use_is_called_so(run):
    found = run(max_steps=1)
    assert "worse than the better baseline: it has not learnt how genes go together" in (found.folder / "README.md").read_text()
