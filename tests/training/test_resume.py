"""Stopping and going on without a trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from geneformer_hf import GeneformerForMaskedLM, load_cells, stream_tokens
from geneformer_hf.data.collators import DataCollatorForMaskedGenes
from geneformer_hf.errors import CheckpointError, OutputError, OutputExistsError, SettingError, TrainingDivergedError
from geneformer_hf.training.checkpointing import UNFINISHED_CHECKPOINT, checkpoints_in
from tests.conftest import tiny_config
from tests.tolerances import TRAJECTORY
from tests.training.conftest import SHAPE, losses

SAVING = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": None}


class Stop(TrainerCallback):
    """Breaks off after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param({}, id="packed"),
        pytest.param({"batch_layout": "padded"}, id="padded_and_grouped"),
        pytest.param({"max_tokens_per_batch": 200, "gradient_accumulation_steps": 2}, id="tokens_accumulated"),
        pytest.param({"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 3}, id="workers_and_evaluation"),
    ],
)
def test_weights_are_bit_equal_with_dropout_on(run, batches):
    """Broken off within the first epoch, at its end and within the second."""
    more = {"shape_overrides": SHAPE | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}} | SAVING | batches
    whole = run("whole", **more)
    for step in (7, whole.figures["steps"] // 2 + 1, whole.figures["steps"] - 1):
        with pytest.raises(KeyboardInterrupt):
            run("broken", callbacks=[Stop(step)], **more)
        resumed = run("broken", **more)
        assert weights_equal(whole.model, resumed.model)
        assert losses(resumed) == losses(whole)
        assert resumed.figures == whole.figures
        shutil.rmtree(resumed.folder.parent)


def test_mixtures_go_on_where_they_were(run, tokens, other_tokens):
    more = SAVING | {"data": {"new": other_tokens, "old": tokens}, "train_weights": [0.7, 0.3], "num_train_epochs": 3, "shape_overrides": SHAPE}
    whole = run("whole", **more)
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(13)], **more)
    assert weights_equal(whole.model, run("broken", **more).model)


def test_the_work_may_be_divided_otherwise_when_going_on(run):
    more = SAVING | {"num_train_epochs": 2}
    whole = run("whole", **more)
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(11)], **more)
    resumed = run("broken", per_device_train_batch_size=2, gradient_accumulation_steps=4, **more)
    assert losses(resumed) == pytest.approx(losses(whole), abs=TRAJECTORY)


def test_killed_between_the_last_step_and_the_model(run):
    more = SAVING | {"save_steps": 24}
    whole = run("whole", **more)
    shutil.rmtree(whole.folder)
    again = run("whole", **more)
    assert weights_equal(whole.model, again.model)
    assert again.figures == whole.figures


def test_a_half_written_checkpoint_is_no_checkpoint(run, tmp_path):
    more = SAVING | {"shape_overrides": SHAPE}
    whole = run("whole", **more)
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(12)], **more)
    # As a kill while saving step 15 leaves it.
    unfinished = tmp_path / "broken" / UNFINISHED_CHECKPOINT / "checkpoint-15"
    shutil.copytree(tmp_path / "whole" / "checkpoint-15", unfinished)
    (unfinished / "optimizer.pt").unlink()
    resumed = run("broken", **more)
    assert weights_equal(whole.model, resumed.model)
    assert not unfinished.parent.exists()


def test_a_full_disk_leaves_the_checkpoint_before(run, tmp_path, monkeypatch):
    more = SAVING | {"shape_overrides": SHAPE, "save_total_limit": 1}
    whole = run("whole", **more)
    save, calls = torch.save, []

    def full(data, path, *args, **kwargs):
        calls.append(str(path))
        if "checkpoint-10" in str(path) and "scheduler" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(data, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OutputError, match=r"checkpoint-10 cannot be written: .*No space left on device.* The one of step 5 is whole; make room and run the same command"
    ):
        run("broken", **more)
    assert any("checkpoint-10" in path for path in calls)
    assert [path.name for path in (tmp_path / "broken").iterdir() if path.is_dir()] == ["checkpoint-5"]
    monkeypatch.setattr(torch, "save", save)
    assert weights_equal(whole.model, run("broken", **more).model)


def test_the_best_checkpoint_is_kept_and_named(run, tmp_path):
    run(**(SAVING | {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "loss"}))
    last = checkpoints_in(tmp_path / "run")[-1]
    best = json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best is not None
    assert Path(best) in checkpoints_in(tmp_path / "run")
    assert len(checkpoints_in(tmp_path / "run")) == 2


def test_figures_are_those_of_the_model_that_is_saved(run):
    """With load_best_model_at_end that is not the model of the last step."""
    found = run(**(SAVING | {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.3,
                             "lr_scheduler_type": "constant"}))  # fmt: skip
    evaluations = [entry["eval_loss"] for entry in found.history if "eval_loss" in entry]
    best = min(evaluations)
    assert evaluations[5] > best, "the last step was not the best"
    assert found.figures["held_out"]["cells"]["after"]["loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 5e-4}, r"learning_rate is 0\.0005 and was 0\.001"),
        ({"seed": 7}, r"seed is 7 and was not given.*seed of order and masks is 7 and was 42"),
        ({"per_device_train_batch_size": 4}, r"cells per step is 4 and was 8"),
        ({"mask_probability": 0.3}, r"mask_probability is 0\.3 and was not given"),
        ({"data_seed": 0}, r"seed of order and masks is 0 and was 42"),
        ({"batch_layout": "padded"}, r"grouped by length is True and was False"),
        ({"shape_overrides": SHAPE | {"hidden_act": "gelu"}}, r"hidden_act of the model is gelu and was relu"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run, tmp_path, change, message):
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(7)], **SAVING)
    # Written in other words, the same run.
    assert run("broken", batch_layout="packed", train_names=["other name"], train_weights=[5.0], **SAVING)
    shutil.rmtree(tmp_path / "broken" / "model")
    with pytest.raises(CheckpointError, match=rf"checkpoint-\d+ belongs to another run: .*{message}"):
        run("broken", **(SAVING | change))


def test_a_checkpoint_of_other_data_or_weights_is_refused(run, other_tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(7)], **SAVING)
    with pytest.raises(CheckpointError, match=r"belongs to another run: data is \['"):
        run("broken", data=other_tokens, **SAVING)
    with pytest.raises(CheckpointError, match="belongs to another run: learning_rate"):
        run("elsewhere", resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"), **(SAVING | {"learning_rate": 5e-4}))
    base = run("base")
    with pytest.raises(CheckpointError, match="first weights is"):
        run("broken", from_checkpoint=str(base.folder), **SAVING)


def test_resuming_from_what_is_no_checkpoint(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint of ours: it has no geneformer_run\.json"):
        run(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to resume from"):
        run(resume_from_checkpoint="True")


def test_a_finished_run_is_neither_overwritten_nor_lost(run):
    first = run()
    with pytest.raises(OutputExistsError, match=r"holds the model of a finished run .* or pass `overwrite: true`"):
        run()
    (first.folder.parent / "notes.txt").write_text("mine")
    again = run(overwrite=True, seed=3)
    assert losses(again) != losses(first)
    assert (first.folder.parent / "notes.txt").read_text() == "mine"
    assert "overwrite" not in (first.folder.parent / "settings.yaml").read_text()


def test_overwriting_goes_on_with_an_unfinished_run_and_replaces_another(run, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(7)], **SAVING)
    run("broken", overwrite=True, **SAVING)
    assert "Going on from" in caplog.text
    caplog.clear()
    shutil.rmtree(tmp_path / "broken" / "model")
    other = run("broken", overwrite=True, **(SAVING | {"learning_rate": 5e-4}))
    assert "Starting" in caplog.text
    assert len(losses(other)) == 24


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(run, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 7:
                with torch.no_grad():
                    model.bert.encoder.layer[0].output.dense.weight.fill_(float("nan"))

    with pytest.raises(
        TrainingDivergedError,
        match=r"The loss is nan at step 8 \(epoch 0\.58, learning rate .*, in the batch of cells rows \d+, .*the weights are not finite either",
    ):
        run(callbacks=[Spoil()], **SAVING)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-5"]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(run, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 7:
                model.bert.encoder.layer[0].output.dense.weight.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(TrainingDivergedError, match=r"The gradient norm is (inf|nan) at step 8 .*the weights before it are finite"):
        run(callbacks=[Spoil()], **(SAVING | {"save_steps": 1}))
    assert [path.name for path in checkpoints_in(tmp_path / "run")][-1] == "checkpoint-7"


def test_trainer_on_a_stream_resumes_row_for_row(h5ad, tokenizer, tmp_path):
    """A plain Trainer, within an epoch of the stream: it takes a stream without a length for one epoch, however often it begins."""
    load_cells(h5ad, tokenizer=tokenizer, cache_dir=tmp_path / "cache").save_to_disk(tmp_path / "tokens")

    def train(name, stop=None, resume=None):
        torch.manual_seed(0)
        model = GeneformerForMaskedLM(tiny_config(tokenizer, hidden_dropout_prob=0.1))
        stream = stream_tokens(tmp_path / "tokens", columns=["input_ids"], shuffle=True, shard_cells=4, mix=3, cell_keys=True)
        arguments = TrainingArguments(
            output_dir=tmp_path / name, max_steps=7, per_device_train_batch_size=4, save_steps=2, logging_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=stream, data_collator=DataCollatorForMaskedGenes(tokenizer), callbacks=[Stop(stop)] if stop else []
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("broken", stop=5)
    assert weights_equal(whole, train("broken", resume=str(tmp_path / "broken" / "checkpoint-4")))


def test_how_often_is_logged_and_saved_may_change(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[Stop(7)], **SAVING)
    resumed = run("broken", **(SAVING | {"save_steps": 8, "logging_steps": 4}))
    assert [path.name for path in checkpoints_in(tmp_path / "broken")] == ["checkpoint-5", "checkpoint-8", "checkpoint-16", "checkpoint-24"]
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [1, 2, 3, 4, 5, 8, 12, 16, 20, 24]


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"the weights are not finite .*so no checkpoint is written|The (loss|gradient norm) is"):
        run(**(SAVING | {"learning_rate": 1e38, "save_steps": 1}))
    assert not checkpoints_in(tmp_path / "run")


def test_overwriting_keeps_what_is_not_of_a_run(run, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine.py").write_text("1")
    with pytest.raises(OutputExistsError, match=r"run/model was not made by a command of geneformer-hf .* It is not replaced"):
        run(overwrite=True)
    assert (tmp_path / "run" / "model" / "mine.py").read_text() == "1"
    with pytest.raises(SettingError, match="overwrite removes a run and resume_from_checkpoint goes on with one"):
        run("other", overwrite=True, resume_from_checkpoint="True")
