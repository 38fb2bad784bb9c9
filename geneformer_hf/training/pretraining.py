"""Pretraining from scratch, and going on from a checkpoint on new domains."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from transformers import IntervalStrategy, TrainerCallback, set_seed

from ..data.mixtures import Mixture
from ..errors import CheckpointError, GeneformerError, OutputError, OutputExistsError, SettingError
from ..models.configuration_geneformer import PRESETS, GeneformerConfig
from ..models.loading import load_model, load_tokenizer, require_same_vocabulary
from ..models.modeling_geneformer import GeneformerForMaskedLM
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import require_apart
from .arguments import GeneformerPretrainingArguments, resolved, suggestion, write_config
from .checkpointing import CONFIG_FILE, MODEL_FOLDER, checkpoint_to_resume, checkpoints_in, remove_leftovers
from .corpora import Cells, open_corpora
from .results import baseline_losses, held_out_figures, save_model
from .trainer import GeneformerPretrainer

logger = logging.getLogger(__name__)

# Settings that change no number: how the work is divided, watched and kept.
# fmt: off
FREE_SETTINGS = frozenset([
    "output_dir", "train_data", "eval_data", "train_names", "from_checkpoint", "tokenizer", "num_processes", "gradient_accumulation_steps", "per_device_train_batch_size",
    "per_device_eval_batch_size", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout",
    "ddp_bucket_cap_mb", "activation_checkpointing", "gradient_checkpointing", "baseline_cells", "use_cpu", "torch_empty_cache_steps",
    # Taken up below as what they come to.
    "batch_layout", "group_by_length", "train_weights", "data_seed",
])
# fmt: on


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
    output, asked = Path(str(arguments.output_dir)), arguments
    if output.exists() and not output.is_dir():
        msg = f"output_dir {output} is a file; name a folder."
        raise OutputError(msg)
    places = [*(arguments.train_data or []), *(arguments.eval_data or []), arguments.from_checkpoint, arguments.tokenizer]
    require_apart(output, [path for path in places if path and Path(path).exists()])
    # Weights of a new model, and dropout, follow from the seed.
    set_seed(arguments.seed)
    tokenizer = tokenizer or _open_tokenizer(arguments)
    corpora = open_corpora(arguments, tokenizer, train_data, eval_data)
    if model is not None and (arguments.shape or arguments.from_checkpoint):
        msg = f"A model was given, and {'shape' if arguments.shape else 'from_checkpoint'} as well; give one of them."
        raise SettingError(msg)
    is_new = model is None and arguments.from_checkpoint is None
    if model is None:
        model = _make_model(arguments, tokenizer)
    require_same_vocabulary(cast(GeneformerConfig, model.config), tokenizer)
    freeze(model, layers=arguments.freeze_layers, embeddings=arguments.freeze_embeddings)
    mixture = Mixture(corpora, arguments.train_weights, seed=arguments.order_seed)
    _require_hidden_genes(arguments, mixture)

    arguments = copy.copy(arguments)
    if not any(corpus.n_held_out for corpus in corpora):
        arguments.eval_strategy = IntervalStrategy.NO
    attention = model.config._attn_implementation
    try:
        trainer = GeneformerPretrainer(model, arguments, mixture=mixture, tokenizer=tokenizer, callbacks=callbacks)
        trainer.require_schedule()
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"Trainer refuses these settings: {error}"
        raise SettingError(msg) from error
    trainer.identity = identity_of(arguments, trainer, model, is_new=is_new)
    with arguments.main_process_first(local=False, desc="look for checkpoints"):
        if arguments.overwrite and arguments.process_index == 0:
            _remove_other_runs(output, trainer.identity, asked_for=arguments.resume_from_checkpoint)
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
    model.set_attn_implementation(attention)
    return PretrainingRun(output / MODEL_FOLDER, trainer.accelerator.unwrap_model(trainer.model), figures, trainer.state.log_history)


def require_processes(arguments: GeneformerPretrainingArguments) -> None:
    """Raise unless the processes that were started are connected, and are those that were meant.

    Both `torchrun` and `accelerate launch` can start processes that know nothing of each other.

    Raises:
        SettingError
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        msg = f"{started} processes were started (WORLD_SIZE), and this one works alone (world size {arguments.world_size}): each would train a model of its own. On a CPU pass --use_cpu; else check the launcher's configuration."
        raise SettingError(msg)
    if arguments.num_processes is not None and arguments.num_processes != arguments.world_size:
        msg = f"num_processes is {arguments.num_processes}, and {arguments.world_size} are running. Start them with `torchrun --nproc_per_node {arguments.num_processes} -m geneformer_hf pretrain …`."
        raise SettingError(msg)
    if arguments.fsdp and arguments.world_size == 1:
        msg = "fsdp divides a model among processes, and there is one. Start several with `torchrun --nproc_per_node …`, or leave fsdp out."
        raise SettingError(msg)
    if arguments.n_gpu > 1:
        msg = f"{arguments.n_gpu} GPUs are visible to one process. Use them with `torchrun --nproc_per_node {arguments.n_gpu} -m geneformer_hf pretrain …`, or show it one (CUDA_VISIBLE_DEVICES=0)."
        raise SettingError(msg)


def _open_tokenizer(arguments: GeneformerPretrainingArguments) -> GeneformerTokenizer:
    where = arguments.tokenizer or arguments.from_checkpoint
    if where is None:
        msg = "No tokenizer: give `tokenizer`, the folder of the one the data were made with (or from_checkpoint, which has one)."
        raise SettingError(msg)
    return load_tokenizer(where)


def _make_model(arguments: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer) -> GeneformerForMaskedLM:
    if arguments.from_checkpoint is not None:
        model = load_model(arguments.from_checkpoint)
        if not isinstance(model, GeneformerForMaskedLM):
            msg = f"{arguments.from_checkpoint} is a {type(model).__name__}; pretraining goes on from a masked-gene model (GeneformerForMaskedLM)."
            raise CheckpointError(msg)
        if next(model.parameters()).dtype != torch.float32:
            # Sums of small updates are lost in half precision; bf16 is for computing (`bf16: true`).
            model = model.float()
        return model
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


def freeze(model: Any, *, layers: int = 0, embeddings: bool = False) -> None:
    """Leave the first layers of the encoder, or its embeddings, as they are.

    Raises:
        SettingError: if the model has fewer layers.
    """
    encoder = model.base_model
    if layers > len(encoder.encoder.layer):
        msg = f"freeze_layers is {layers}, and the model has {len(encoder.encoder.layer)} layers."
        raise SettingError(msg)
    frozen = [*encoder.encoder.layer[:layers], *([encoder.embeddings] if embeddings else [])]
    for module in frozen:
        module.requires_grad_(requires_grad=False)


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


def identity_of(arguments: GeneformerPretrainingArguments, trainer: GeneformerPretrainer, model: Any, *, is_new: bool) -> dict[str, Any]:
    """Return all that the numbers of a run depend on: a checkpoint is for runs that agree in it."""
    settings = {name: value for name, value in resolved(arguments).items() if name not in FREE_SETTINGS}
    batch = {"tokens per batch": arguments.max_tokens_per_batch, "batches per step": trainer.plan.batches_per_step, "batch layout": trainer.layout}
    if not arguments.max_tokens_per_batch:
        batch = {"cells per step": arguments.train_batch_size * trainer.plan.batches_per_step}
    unimportant = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unimportant}
    # New weights follow from the seed; others are told apart by what they are, not by where they lie.
    weights = xxhash.xxh3_128()
    if not is_new:
        for tensor in model.state_dict().values():
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        **settings,
        **batch,
        "grouped by length": trainer.plan.group_by_length,
        "shares": [round(float(share), 9) for share in trainer.mixture.shares],
        "seed of order and masks": arguments.order_seed,
        "model": config,
        "first weights": weights.hexdigest(),
        "data": [corpus.fingerprint for corpus in trainer.mixture.corpora],
    }


def _remove_other_runs(output: Path, identity: dict[str, Any], *, asked_for: str | None) -> None:
    """Remove model, checkpoints and settings of a run that is finished or another one, and nothing else; an unfinished one goes on.

    Raises:
        SettingError: if a checkpoint to go on from was named as well.
        OutputExistsError: if the folder `model` there is not the work of `pretrain`.
    """
    if asked_for is not None:
        msg = "overwrite removes a run and resume_from_checkpoint goes on with one; give one of them."
        raise SettingError(msg)
    model = output / MODEL_FOLDER
    if model.exists():
        if not (model / CONFIG_FILE).is_file():
            msg = f"{model} was not written by `pretrain` (it holds no {CONFIG_FILE}), so it is not removed. Choose another output_dir."
            raise OutputExistsError(msg)
    elif _is_unfinished(output, identity):
        return
    for path in checkpoints_in(output):
        shutil.rmtree(path)
    shutil.rmtree(model, ignore_errors=True)


def _is_unfinished(output: Path, identity: dict[str, Any]) -> bool:
    """Return whether a folder without a model holds this run, or nothing of another."""
    try:
        checkpoint_to_resume(output, asked_for=None, identity=identity)
    except CheckpointError:
        return False
    return True


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
