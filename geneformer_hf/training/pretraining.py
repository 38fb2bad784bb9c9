"""Pretraining from scratch, and going on from a checkpoint on new domains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import IntervalStrategy, TrainerCallback, set_seed

from ..data.mixtures import Mixture
from ..errors import CheckpointError, OutputError, SettingError
from ..models.adapters import is_adapter, unwrapped
from ..models.configuration_geneformer import PRESETS, GeneformerConfig
from ..models.loading import load_model, require_same_vocabulary
from ..models.modeling_geneformer import GeneformerForMaskedLM
from ..models.places import local_folder
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import require_apart
from .arguments import GeneformerPretrainingArguments
from .checkpointing import CONFIG_FILE, MODEL_FOLDER, checkpoint_to_resume, only_run, remove_leftovers, remove_other_runs
from .configs import write_config
from .corpora import Cells, open_corpora
from .identity import identity_of
from .planned import refusals_of_trainer
from .processes import require_processes
from .results import baseline_losses, held_out_figures, save_model
from .settings import suggestion
from .starting import adapted, open_base, open_tokenizer
from .trainer import GeneformerPretrainer

logger = logging.getLogger(__name__)


@dataclass
class PretrainingRun:
    """What `pretrain` returns."""

    folder: Path
    """The finished model: opens with the Auto classes."""
    model: Any
    figures: dict[str, Any]
    """Losses and accuracies on held-out cells, those of the baselines among them; see `figures.json`."""
    history: list[dict[str, float]]
    """What was logged, step by step."""


def pretrain(
    arguments: GeneformerPretrainingArguments,
    train_data: Cells | None = None,
    *,
    eval_data: Cells | None = None,
    tokenizer: GeneformerTokenizer | None = None,
    model: GeneformerForMaskedLM | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PretrainingRun:
    """Train a masked-gene model, in one process or in as many as `torchrun` or `accelerate launch` started.

    Stopped or killed, the same call goes on from the last checkpoint in `output_dir`, as if nothing had happened.

    Args:
        arguments (`GeneformerPretrainingArguments`)
        train_data, eval_data (`Dataset` or `dict[str, Dataset]`, *optional*): in place of `arguments.train_data` and `eval_data`.
        tokenizer, model (*optional*): in place of `arguments.tokenizer`, and of `shape` or `from_checkpoint`.
        callbacks: for the Trainer.

    Returns:
        `PretrainingRun`; the model lies in `output_dir/model`.

    Raises:
        SettingError, CellFileError, VocabularyMismatchError, CheckpointError, OutputExistsError, OutputError, TrainingDivergedError
    """
    require_processes(arguments)
    output = Path(str(arguments.output_dir))
    if output.exists() and not output.is_dir():
        msg = f"output_dir {output} is a file; name a folder."
        raise OutputError(msg)
    require_apart(output, [*(arguments.train_data or []), *(arguments.eval_data or []), arguments.from_checkpoint, arguments.tokenizer])
    with only_run(output, is_main=arguments.process_index == 0):
        return _pretrain(arguments, output, train_data, eval_data, tokenizer, model, callbacks)


def _pretrain(
    arguments: GeneformerPretrainingArguments,
    output: Path,
    train_data: Any,
    eval_data: Any,
    tokenizer: GeneformerTokenizer | None,
    model: Any,
    callbacks: Sequence[TrainerCallback],
) -> PretrainingRun:
    """Train in a folder that this run holds."""
    asked = arguments
    # Weights of a new model, and dropout, follow from the seed.
    set_seed(arguments.seed)
    tokenizer = tokenizer or open_tokenizer(arguments)
    corpora = open_corpora(arguments, tokenizer, train_data, eval_data)
    if model is not None and (arguments.shape or arguments.from_checkpoint):
        msg = f"A model was given, and {'shape' if arguments.shape else 'from_checkpoint'} as well; give one of them."
        raise SettingError(msg)
    is_new = model is None and arguments.from_checkpoint is None
    if model is None:
        model = _make_model(arguments, tokenizer)
    require_same_vocabulary(cast(GeneformerConfig, unwrapped(model).config), tokenizer)
    model = adapted(model, arguments)
    mixture = Mixture(corpora, arguments.train_weights, seed=arguments.order_seed)
    _require_hidden_genes(arguments, mixture)

    arguments = copy.copy(arguments)
    if not any(corpus.n_held_out for corpus in corpora):
        arguments.eval_strategy = IntervalStrategy.NO
    attention = unwrapped(model).config._attn_implementation
    with refusals_of_trainer():
        trainer = GeneformerPretrainer(model, arguments, mixture=mixture, tokenizer=tokenizer, callbacks=callbacks)
        trainer.require_schedule()
    trainer.identity = identity_of(arguments, trainer, model, is_new=is_new)
    with arguments.main_process_first(local=False, desc="look for checkpoints"):
        if arguments.overwrite and arguments.process_index == 0:
            remove_other_runs(output, trainer.identity, asked_for=arguments.resume_from_checkpoint, made_by="pretrain")
        resume = checkpoint_to_resume(output, asked_for=arguments.resume_from_checkpoint, identity=trainer.identity)
    if arguments.from_checkpoint is not None and resume is None and trainer.eval_dataset:
        # What was known before, so that learning and forgetting can be told.
        arguments.eval_on_start = True
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        write_config(asked, output / CONFIG_FILE)
        logger.warning("%s", _announcement(arguments, trainer, resume))
    trainer.accelerator.wait_for_everyone()
    baselines = baseline_losses(mixture, tokenizer, arguments) if trainer.is_world_process_zero() else {}
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        trainer.close_bar()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
    # On every process alike: the history is the same.
    stale = not evaluated or arguments.load_best_model_at_end
    after = {} if not trainer.eval_dataset else trainer.evaluate() if stale else evaluated[-1]
    figures = held_out_figures(trainer, after, baselines)
    save_model(trainer, tokenizer, figures, asked)
    unwrapped(model).set_attn_implementation(attention)
    return PretrainingRun(output / MODEL_FOLDER, trainer.accelerator.unwrap_model(trainer.model), figures, trainer.state.log_history)


def _make_model(arguments: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer) -> GeneformerForMaskedLM:
    if arguments.from_checkpoint is not None:
        return _open_masked(arguments, tokenizer)
    if arguments.shape is None:
        msg = "No model: give `shape` for a new one, or `from_checkpoint` to go on from one."
        raise SettingError(msg)
    overrides = arguments.shape_overrides or {}
    if not isinstance(overrides, dict):
        msg = f"shape_overrides is {overrides!r}; expected names and values, as {{hidden_size: 128}}."
        raise SettingError(msg)
    known = GeneformerConfig().to_dict()
    unknown = [f"{name}{suggestion(str(name), known)}" for name in overrides if name not in known]
    if unknown:
        msg = f"shape_overrides: {', '.join(unknown)} is no field of the configuration."
        raise SettingError(msg)
    ours = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocabulary_fingerprint": tokenizer.gene_table.fingerprint,
    }
    positions = overrides.get("max_position_embeddings", PRESETS[arguments.shape]["max_position_embeddings"])
    if isinstance(positions, int) and positions < tokenizer.model_max_length:
        msg = (
            f"the tokenizer keeps {tokenizer.model_max_length:,} tokens a cell and the model has {positions:,} positions ({arguments.shape}). Choose a shape with {tokenizer.model_max_length:,}, "
            f"or add `shape_overrides: {{max_position_embeddings: {tokenizer.model_max_length}}}`."
        )
        raise SettingError(msg)
    try:
        return GeneformerForMaskedLM(GeneformerConfig.from_preset(arguments.shape, **(ours | overrides)))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        msg = f"shape_overrides {overrides} cannot be used: {str(error).splitlines()[0]}"
        raise SettingError(msg) from error


def _open_masked(arguments: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer) -> GeneformerForMaskedLM:
    if arguments.quantization != "none":
        return open_base(arguments, GeneformerForMaskedLM, {}, tokenizer)
    model = load_model(arguments.from_checkpoint)
    if not isinstance(model, GeneformerForMaskedLM):
        msg = f"{arguments.from_checkpoint} is a {type(model).__name__}; pretraining goes on from a masked-gene model (GeneformerForMaskedLM)."
        raise CheckpointError(msg)
    if is_adapter(local_folder(str(arguments.from_checkpoint))):
        msg = f"{arguments.from_checkpoint} is an adapter. Merge it with its base first (`geneformer-hf export {arguments.from_checkpoint} OUTPUT --format merged`), and go on from OUTPUT."
        raise CheckpointError(msg)
    if next(model.parameters()).dtype != torch.float32:
        # Sums of small updates are lost in half precision; bf16 is for computing (`bf16: true`).
        model = model.float()
    return model


def _require_hidden_genes(arguments: GeneformerPretrainingArguments, mixture: Mixture) -> None:
    """Raise if so few genes are hidden that steps, or the evaluation, would be without any."""
    for corpus in mixture.corpora:
        held_out = float(corpus.lengths[corpus.held_out_rows].sum()) * arguments.mask_probability
        if corpus.n_held_out and held_out < 10:
            msg = f"{corpus.name}: about {held_out:.1f} genes would be hidden in {corpus.n_held_out:,} held-out cells, too few to say anything. Hold out more (held_out), or none."
            raise SettingError(msg)
        if arguments.mask_probability * float(corpus.lengths.mean()) * arguments.train_batch_size < 1:
            msg = f"mask_probability {arguments.mask_probability} hides less than one gene in a batch of {arguments.train_batch_size} cells of {corpus.lengths.mean():.0f} tokens. Raise it."
            raise SettingError(msg)


def _announcement(arguments: GeneformerPretrainingArguments, trainer: GeneformerPretrainer, resume: Path | None) -> str:
    plan, mixture = trainer.plan, trainer.mixture
    shown = ", ".join(f"{c.name} {c.n_train:,} ({share:.0%})" for c, share in zip(mixture.corpora, mixture.shares, strict=True))
    size = f"{arguments.max_tokens_per_batch:,} tokens" if arguments.max_tokens_per_batch else f"{arguments.train_batch_size:,} cells"
    n_parameters = sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters())
    per_step = arguments.train_batch_size * plan.batches_per_step
    several = (
        ""
        if arguments.max_tokens_per_batch or per_step <= mixture.cells_per_epoch
        else f" A step of {per_step:,} cells shows some of them several times: lower per_device_train_batch_size."
    )
    return (
        f"{'Going on from ' + str(resume) if resume else 'Starting'}: {n_parameters:,} parameters; {shown} cells to train on, {sum(c.n_held_out for c in mixture.corpora):,} held out; "
        f"{_number(plan.steps_per_epoch, 'step')} an epoch, each of {_number(plan.batches_per_step, plan.layout + ' batch')} of {size} "
        f"({_number(arguments.world_size, 'process')}, {arguments.device.type}).{several}"
    )


def _number(n: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{n:,} {what}{'' if n == 1 else 'es' if what.endswith(('s', 'ch')) else 's'}"
