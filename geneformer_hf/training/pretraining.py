"""Pretraining from scratch, and going on from a checkpoint on new domains."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
import xxhash
from transformers import TrainerCallback, set_seed

from .._version import __version__
from ..data.masking import GeneMasker
from ..data.mixtures import EVALUATION, CellKey, Corpus, Mixture
from ..data.tokenized import open_tokenized, require_made_with
from ..errors import CheckpointError, SettingError
from ..models.configuration_geneformer import GeneformerConfig
from ..models.loading import load_model, load_tokenizer, require_same_vocabulary
from ..models.modeling_geneformer import IGNORED, GeneformerForMaskedLM
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import require_apart
from ..reports.baselines import GeneFrequencyBaseline, RankFrequencyBaseline
from ..reports.cards import PretrainingFacts, pretraining_card
from ..reports.plots import plot_loss
from .arguments import GeneformerPretrainingArguments, resolved, write_config
from .checkpointing import CONFIG_FILE, MODEL_FOLDER, UNFINISHED_MODEL, checkpoint_to_resume, put_in_place, remove_leftovers
from .trainer import GeneformerPretrainer

logger = logging.getLogger(__name__)

# Settings that change no number: how the work is divided, watched and kept.
FREE_SETTINGS = frozenset(
    [
        "output_dir",
        "train_data",
        "from_checkpoint",
        "tokenizer",
        "overwrite",
        "num_processes",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "load_best_model_at_end",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "use_cpu",
        "ddp_backend",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "local_rank",
        "metric_for_best_model",
        "greater_is_better",
        "activation_checkpointing",
        "gradient_checkpointing",
        "baseline_cells",
        "do_train",
        "do_eval",
        "do_predict",
    ]
)
PLACES = ("output_dir", "train_data", "tokenizer", "from_checkpoint", "resume_from_checkpoint")


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
    train_data: dict[str, datasets.Dataset] | datasets.Dataset | None = None,
    *,
    tokenizer: GeneformerTokenizer | None = None,
    model: GeneformerForMaskedLM | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PretrainingRun:
    """Train a masked-gene model, in one process or in as many as `torchrun` or `accelerate launch` started.

    Stopped or killed, the same call goes on from the last checkpoint in `output_dir`, as if nothing had happened.

    Args:
        arguments (`GeneformerPretrainingArguments`)
        train_data (`Dataset` or `dict[str, Dataset]`, *optional*): in place of `arguments.train_data`.
        tokenizer, model (*optional*): in place of `arguments.tokenizer`, and of `shape` or `from_checkpoint`.
        callbacks: for the Trainer.

    Returns:
        `PretrainingRun`; the model lies in `output_dir/model`.

    Raises:
        SettingError, CellFileError, VocabularyMismatchError, CheckpointError, OutputExistsError, OutputError, TrainingDivergedError
    """
    require_processes(arguments)
    output = Path(str(arguments.output_dir))
    # Weights of a new model, and dropout, follow from the seed.
    set_seed(arguments.seed)
    tokenizer = tokenizer or _open_tokenizer(arguments)
    corpora = open_corpora(arguments, train_data, tokenizer)
    if model is None:
        model = _make_model(arguments, tokenizer)
    require_same_vocabulary(cast(GeneformerConfig, model.config), tokenizer)
    freeze(model, layers=arguments.freeze_layers, embeddings=arguments.freeze_embeddings)
    mixture = Mixture(corpora, arguments.train_weights, seed=arguments.order_seed)
    identity = identity_of(arguments, mixture, tokenizer, model)

    if arguments.train_data:
        require_apart(output, [path for path in [*arguments.train_data, arguments.from_checkpoint, arguments.tokenizer] if path and Path(path).exists()])
    if arguments.overwrite and arguments.process_index == 0:
        _remove_run(output)
    arguments = copy.copy(arguments)
    with arguments.main_process_first(desc="look for checkpoints"):
        resume = checkpoint_to_resume(output, asked_for=arguments.resume_from_checkpoint, identity=identity)
    arguments.eval_on_start = arguments.eval_on_start or (arguments.from_checkpoint is not None and resume is None and any(c.held_out for c in corpora))

    trainer = GeneformerPretrainer(model, arguments, mixture=mixture, tokenizer=tokenizer, identity=identity, callbacks=callbacks)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        write_config(arguments, output / CONFIG_FILE)
        logger.warning("%s", _announcement(arguments, trainer, resume))
    trainer.accelerator.wait_for_everyone()
    baselines = baseline_losses(mixture, tokenizer, arguments) if trainer.is_world_process_zero() else {}
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
    # On every process alike: the history is the same.
    after = evaluated[-1] if evaluated else trainer.evaluate() if trainer.eval_dataset else {}
    figures = _figures(trainer, after, baselines)
    _save(trainer, tokenizer, figures, output)
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
    unknown = [name for name in overrides if not hasattr(GeneformerConfig(), name)]
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
    try:
        return GeneformerForMaskedLM(GeneformerConfig.from_preset(arguments.shape, **(ours | overrides)))
    except (ValueError, TypeError) as error:
        msg = f"shape_overrides {overrides} cannot be used: {str(error).splitlines()[0]}"
        raise SettingError(msg) from error


def open_corpora(
    arguments: GeneformerPretrainingArguments, train_data: dict[str, datasets.Dataset] | datasets.Dataset | None, tokenizer: GeneformerTokenizer
) -> list[Corpus]:
    """Open and check the datasets to train on.

    Raises:
        SettingError, CellFileError, VocabularyMismatchError
    """
    if train_data is None:
        paths = arguments.train_data or []
        if not paths:
            msg = "No data: give `train_data`, tokenized datasets to train on (`geneformer-hf tokenize`)."
            raise SettingError(msg)
        names = arguments.train_names or _names_of(paths)
        opened = [open_tokenized(path) for path in paths]
    else:
        by_name = train_data if isinstance(train_data, dict) else {"cells": train_data}
        names, opened = arguments.train_names or list(by_name), list(by_name.values())
    if len(names) != len(opened) or len(set(names)) != len(names):
        msg = f"train_names {names} for {len(opened)} datasets; expected one name for each, all different."
        raise SettingError(msg)
    for name, cells in zip(names, opened, strict=True):
        if "input_ids" in cells.column_names and len(cells):
            require_made_with(cells, tokenizer, name=name)
    corpora = [Corpus(name, cells, _n_held_out(arguments.held_out, len(cells)), seed=arguments.order_seed) for name, cells in zip(names, opened, strict=True)]
    for corpus in corpora:
        if corpus.lengths.max() > tokenizer.model_max_length or corpus.lengths.min() < 1:
            bad = int(((corpus.lengths > tokenizer.model_max_length) | (corpus.lengths < 1)).sum())
            msg = f"{corpus.name}: {bad:,} of {len(corpus.lengths):,} cells have no token, or more than {tokenizer.model_max_length:,} (up to {corpus.lengths.max():,}). Tokenize them with this model's tokenizer, which keeps the highest ranks."
            raise SettingError(msg)
    return corpora


def _n_held_out(held_out: float, n_cells: int) -> int:
    return max(1, round(held_out * n_cells)) if 0 < held_out < 1 else int(held_out)


def _names_of(paths: Sequence[str]) -> list[str]:
    names = [Path(path).name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [f"{name}{i + 1}" for i, name in enumerate(names)]


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


def identity_of(arguments: GeneformerPretrainingArguments, mixture: Mixture, tokenizer: GeneformerTokenizer, model: Any) -> dict[str, Any]:
    """Return all that the numbers of a run depend on: a checkpoint is for runs that agree in it."""
    settings = {name: value for name, value in resolved(arguments).items() if name not in FREE_SETTINGS}
    batch = {"tokens per batch": arguments.max_tokens_per_batch, "batches per step": arguments.world_size * arguments.gradient_accumulation_steps}
    if not arguments.max_tokens_per_batch:
        batch = {"cells per step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size}
    config = model.config.to_dict()
    shape = {
        name: config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    }
    # New weights follow from the seed; others are told apart by what they are, not by where they lie.
    weights = xxhash.xxh3_128()
    if arguments.shape is None:
        for tensor in model.state_dict().values():
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        **settings,
        **batch,
        "model": shape,
        "first weights": weights.hexdigest(),
        "gene table": tokenizer.gene_table.fingerprint,
        "data": [corpus.fingerprint for corpus in mixture.corpora],
    }


def _remove_run(output: Path) -> None:
    """Remove what an earlier run left: its model, checkpoints and settings, and nothing else."""
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(output / MODEL_FOLDER, ignore_errors=True)
    (output / CONFIG_FILE).unlink(missing_ok=True)


def _announcement(arguments: GeneformerPretrainingArguments, trainer: GeneformerPretrainer, resume: Path | None) -> str:
    plan, mixture = trainer.plan, trainer.mixture
    shown = ", ".join(f"{c.name} {c.n_train:,} ({share:.0%})" for c, share in zip(mixture.corpora, mixture.shares, strict=True))
    size = f"{arguments.max_tokens_per_batch:,} tokens" if arguments.max_tokens_per_batch else f"{arguments.train_batch_size:,} cells"
    return (
        f"{'Going on from ' + str(resume) if resume else 'Starting'}: {shown} cells to train on, {sum(c.held_out for c in mixture.corpora):,} held out; "
        f"{plan.steps_per_epoch:,} steps an epoch, each of {plan.batches_per_step} {plan.layout} batches of {size} ({arguments.world_size} {'processes' if arguments.world_size > 1 else 'process'}, {arguments.device.type})."
    )


def baseline_losses(mixture: Mixture, tokenizer: GeneformerTokenizer, arguments: GeneformerPretrainingArguments) -> dict[str, dict[str, float]]:
    """Return the losses of two smoothed baselines at the same hidden genes of the same held-out cells, by corpus.

    They count genes in up to `baseline_cells` training cells of each corpus, drawn by the seed.
    """
    masker = GeneMasker(tokenizer, arguments.rates, seed=arguments.order_seed)
    first = int(tokenizer.cls_token_id is not None)
    found = {}
    for number, corpus in enumerate(mixture.corpora):
        if not corpus.held_out:
            continue
        n = min(arguments.baseline_cells, corpus.n_train)
        places = np.sort(np.random.default_rng([arguments.order_seed, 3, number]).choice(corpus.n_train, n, replace=False))
        rows = corpus.train_rows(places).tolist()
        cells = corpus.read(rows)
        masker.require_known(np.concatenate(cells), np.array([len(cell) for cell in cells]), [CellKey(number, row, 0) for row in rows])
        genes = [_genes(cell, tokenizer) for cell in cells]
        size = max(tokenizer.get_vocab().values()) + 1
        baselines: dict[str, Any] = {"gene_frequency": GeneFrequencyBaseline(genes, size), "rank_frequency": RankFrequencyBaseline(genes, size)}
        hidden, ranks = [], []
        for row, cell in zip(corpus.held_out_rows.tolist(), corpus.read(corpus.held_out_rows.tolist()), strict=True):
            _, labels = masker.hide(cell, np.array([len(cell)]), [CellKey(number, row, EVALUATION)])
            places_m = np.flatnonzero(labels != IGNORED)
            hidden.append(labels[places_m])
            ranks.append(places_m - first)
        genes_m, ranks_m = np.concatenate(hidden), np.concatenate(ranks)
        found[corpus.name] = {name: baseline.loss(genes_m, ranks_m) for name, baseline in baselines.items()} | {"hidden_genes": len(genes_m)}
    return found


def _genes(cell: np.ndarray, tokenizer: GeneformerTokenizer) -> np.ndarray:
    return cell[int(tokenizer.cls_token_id is not None) : len(cell) - int(tokenizer.eos_token_id is not None)]


def _figures(trainer: GeneformerPretrainer, after: dict[str, float], baselines: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Gather what held-out cells say, before and after, by corpus."""
    history = trainer.state.log_history
    before = next((entry for entry in history if entry["step"] == 0 and "eval_loss" in entry), {})
    corpora = [corpus.name for corpus in trainer.mixture.corpora if corpus.held_out]

    def of(metrics: dict[str, float], name: str) -> dict[str, float]:
        prefix = f"eval_{name}_" if len(corpora) > 1 else "eval_"
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    held_out = {}
    for corpus in trainer.mixture.corpora:
        if corpus.held_out:
            held_out[corpus.name] = {
                "cells": corpus.held_out,
                "after": of(after, corpus.name),
                "before": of(before, corpus.name),
                "baselines": baselines.get(corpus.name, {}),
            }
    return {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "held_out": held_out}


def _save(trainer: GeneformerPretrainer, tokenizer: GeneformerTokenizer, figures: dict[str, Any], output: Path) -> None:
    """Write the final folder: model, tokenizer, card, figures, loss curve, settings; whole or not there."""
    unfinished = output / UNFINISHED_MODEL
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        # Trainer's own record of the arguments is a pickle; run.yaml says the same.
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        tokenizer.save_pretrained(unfinished)
        write_config(trainer.args, unfinished / CONFIG_FILE)
        (unfinished / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (unfinished / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
        draw_losses(trainer.state.log_history, figures, unfinished / "loss.png")
        facts = PretrainingFacts(
            config=trainer.accelerator.unwrap_model(trainer.model).config,
            corpora=[(c.name, c.n_train, c.held_out, float(share)) for c, share in zip(trainer.mixture.corpora, trainer.mixture.shares, strict=True)],
            # Without the paths of this machine.
            settings={name: value for name, value in resolved(trainer.args).items() if name not in PLACES},
            figures=figures,
            started_from=trainer.args.from_checkpoint and Path(trainer.args.from_checkpoint).name,
            version=__version__,
        )
        (unfinished / "README.md").write_text(pretraining_card(facts, name=output.name), encoding="utf-8")
        for path in unfinished.iterdir():
            # safetensors makes files for the owner alone.
            path.chmod(0o644)
        put_in_place(unfinished, output / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()


def draw_losses(history: Sequence[dict[str, float]], figures: dict[str, Any], path: Path) -> None:
    """Draw the losses of a run beside the baselines, where matplotlib is installed."""
    steps = [int(entry["step"]) for entry in history if "loss" in entry]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    references = {}
    for name, found in figures["held_out"].items():
        suffix = f", {name}" if len(figures["held_out"]) > 1 else ""
        for key, text in (("gene_frequency", "gene frequency"), ("rank_frequency", "gene frequency by rank")):
            if key in found["baselines"]:
                references[f"{text}, held out{suffix}"] = found["baselines"][key]
    try:
        plot_loss(steps, losses, path, title="Masked-gene loss", references=references, held_out=held_out)
    except ImportError as error:
        logger.warning("No picture of the losses: %s", error)
