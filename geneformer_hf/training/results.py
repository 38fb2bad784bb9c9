"""What a finished run shows: figures on held-out cells beside two baselines, loss curve, model card, the final folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.masking import CellKey, GeneMasker
from ..data.mixtures import EVALUATION, Mixture
from ..gene_ids import species_of
from ..models.adapters import unwrapped
from ..models.heads import IGNORED
from ..models.places import repository_of, short_name
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.baselines import GeneFrequencyBaseline, RankFrequencyBaseline
from ..reports.cards import PretrainingFacts, pretraining_card
from ..reports.metrics import MaskedGeneScores
from ..reports.plots import plot_training
from .arguments import GeneformerPretrainingArguments
from .checkpointing import CONFIG_FILE, UNFINISHED_MODEL, put_model, save_weights
from .configs import resolved, write_config
from .trainer import GeneformerPretrainer

logger = logging.getLogger(__name__)

PLACES = ("output_dir", "train_data", "eval_data", "tokenizer", "from_checkpoint", "resume_from_checkpoint")


def baseline_losses(mixture: Mixture, tokenizer: GeneformerTokenizer, arguments: GeneformerPretrainingArguments) -> dict[str, dict[str, float]]:
    """Return the losses of two smoothed baselines at the same hidden genes of the same held-out cells, by corpus.

    They count genes in up to `baseline_cells` training cells of each corpus, drawn by the seed.
    """
    masker = GeneMasker(tokenizer, arguments.rates, seed=arguments.order_seed)
    first = int(tokenizer.cls_token_id is not None)
    found = {}
    for number, corpus in enumerate(mixture.corpora):
        if not corpus.n_held_out:
            continue
        n = min(arguments.baseline_cells, corpus.n_train)
        places = np.sort(np.random.default_rng([arguments.order_seed, 3, number]).choice(corpus.n_train, n, replace=False))
        rows = corpus.train_rows(places).tolist()
        cells = corpus.read(rows)
        masker.require_known(np.concatenate(cells), np.array([len(cell) for cell in cells]), [CellKey(number, row, 0) for row in rows])
        genes = [_genes(cell, tokenizer) for cell in cells]
        size = max(tokenizer.get_vocab().values()) + 1
        baselines: dict[str, Any] = {"gene_frequency": GeneFrequencyBaseline(genes, size), "rank_frequency": RankFrequencyBaseline(genes, size)}
        hidden, ranks, masked = [], [], []
        for row, cell in zip(corpus.held_out_rows.tolist(), corpus.read(corpus.held_out_rows.tolist()), strict=True):
            ids, labels = masker.hide(cell, np.array([len(cell)]), [CellKey(number, row, EVALUATION)])
            places_m = np.flatnonzero(labels != IGNORED)
            hidden.append(labels[places_m])
            ranks.append(places_m - first)
            masked.append(ids[places_m] == masker.mask_token_id)
        genes_m, ranks_m, masked_m = np.concatenate(hidden), np.concatenate(ranks), np.concatenate(masked)
        found[corpus.name] = {name: baseline.loss(genes_m, ranks_m) for name, baseline in baselines.items()}
        found[corpus.name] |= {f"{name}_at_mask": baseline.loss(genes_m[masked_m], ranks_m[masked_m]) for name, baseline in baselines.items()}
        found[corpus.name] |= {"hidden_genes": len(genes_m), "hidden_by_mask": int(masked_m.sum())}
    return found


def _genes(cell: np.ndarray, tokenizer: GeneformerTokenizer) -> np.ndarray:
    return cell[int(tokenizer.cls_token_id is not None) : len(cell) - int(tokenizer.eos_token_id is not None)]


def held_out_figures(trainer: GeneformerPretrainer, after: dict[str, float], baselines: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Gather what held-out cells say, before and after, by corpus."""
    history = trainer.state.log_history
    before = next((entry for entry in history if entry["step"] == 0 and "eval_loss" in entry), {})
    corpora = [corpus.name for corpus in trainer.mixture.corpora if corpus.n_held_out]

    def of(metrics: dict[str, float], name: str) -> dict[str, float]:
        prefix = f"eval_{name}_" if len(corpora) > 1 else "eval_"
        return {key: metrics[prefix + key] for key in MaskedGeneScores().figures() if prefix + key in metrics}

    held_out = {}
    for corpus in trainer.mixture.corpora:
        if corpus.n_held_out:
            held_out[corpus.name] = {
                "cells": corpus.n_held_out,
                "evaluated_on": corpus.held_out_from,
                "after": of(after, corpus.name),
                "before": of(before, corpus.name),
                "baselines": baselines.get(corpus.name, {}),
            }
    return {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "held_out": held_out}


def save_model(trainer: GeneformerPretrainer, tokenizer: GeneformerTokenizer, figures: dict[str, Any], asked: GeneformerPretrainingArguments) -> None:
    """Write the final folder: model, tokenizer, card, figures, loss curve, settings; whole or not there."""
    output = Path(str(asked.output_dir))
    unfinished = output / UNFINISHED_MODEL
    save_weights(trainer, unfinished)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(unfinished)
        write_config(asked, unfinished / CONFIG_FILE)
        (unfinished / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (unfinished / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
        draw_losses(trainer.state.log_history, figures, unfinished / "loss.png")
        facts = PretrainingFacts(
            config=unwrapped(trainer.accelerator.unwrap_model(trainer.model)).config,
            corpora=[
                (c.name, c.n_train, c.n_held_out, float(share), c.held_out_from)
                for c, share in zip(trainer.mixture.corpora, trainer.mixture.shares, strict=True)
            ],
            # Without the paths of this machine.
            settings={name: value for name, value in resolved(asked).items() if name not in PLACES},
            figures=figures,
            started_from=short_name(asked.from_checkpoint) if asked.from_checkpoint else None,
            base_model=repository_of(asked.from_checkpoint),
            datasets=sorted({c.repository for c in trainer.mixture.corpora if c.repository}),
            seed=asked.seed,
            species=species_of(tokenizer.gene_table.ensembl_ids),
        )
        (unfinished / "README.md").write_text(pretraining_card(facts, name=output.name), encoding="utf-8")
        for path in unfinished.iterdir():
            # safetensors makes files for the owner alone.
            path.chmod(0o644)
        put_model(unfinished, output, made_by="pretrain")
    trainer.accelerator.wait_for_everyone()


def draw_losses(history: Sequence[dict[str, float]], figures: dict[str, Any], path: Path) -> None:
    """Draw the losses of a run beside the baselines, where matplotlib is installed."""
    steps = [int(entry["step"]) for entry in history if "loss" in entry]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    held_out, references = {}, {}
    for name, found in figures["held_out"].items():
        key = f"eval_{name}_loss" if len(figures["held_out"]) > 1 else "eval_loss"
        held_out[name] = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
        references[name] = {"gene frequency": found["baselines"]["gene_frequency"], "frequency by rank": found["baselines"]["rank_frequency"]}
    try:
        plot_training(steps, losses, path, held_out=held_out, references=references)
    except ImportError as error:
        logger.warning("No picture of the losses: %s", error)
