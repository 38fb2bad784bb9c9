"""Model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..models.configuration_geneformer import GeneformerConfig

PAPERS = {
    "V1": "Theodoris et al. 2023, Transfer learning enables predictions in network biology, Nature 618:616 (doi:10.1038/s41586-023-06139-9)",
    "V2": "Chen et al. 2024, Quantized multi-task learning for context-specific representations of gene network dynamics (bioRxiv 2024.08.16.608180)",
}


def checkpoint_card(config: GeneformerConfig, *, title: str, vocabulary: str, origin: str, version: str | None, folder: str = "FOLDER") -> str:
    """Return the card of a converted checkpoint as Markdown with the metadata the Hub reads.

    Args:
        title (`str`): heading.
        vocabulary (`str`): genes and special tokens, for people.
        origin (`str`): where the checkpoint comes from.
        version (`"V1"`, `"V2"` or None): which paper to cite.
        folder (`str`, *optional*): what to open in the example.
    """
    rows = {
        "Architecture": (config.architectures or ["GeneformerForMaskedLM"])[0],
        "Layers, hidden size, heads, feed-forward": f"{config.num_hidden_layers}, {config.hidden_size:,}, {config.num_attention_heads}, {config.intermediate_size:,}",
        "Tokens per cell": f"{config.max_position_embeddings:,}",
        "Vocabulary": f"{config.vocab_size:,} ({vocabulary})",
        "Converted from": origin,
    }
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [geneformer, single-cell, transcriptomics, biology]",
        "---",
        "",
        f"# {title}",
        "",
        "A converted copy of a Geneformer checkpoint for the Auto classes of transformers. The weights are unchanged: every tensor",
        "and token id was compared with the source. This is not an official release of the Geneformer authors.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "```python",
        "import geneformer_hf  # registers the Auto classes",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        f'model = AutoModelForMaskedLM.from_pretrained("{folder}")',
        'adata.obsm["X_geneformer"] = geneformer_hf.embed_cells(model, adata, tokenizer=tokenizer)',
        "```",
        "",
        "Input: raw transcript counts of human cells with Ensembl ids or symbols; not normalised values.",
        "Zero-shot embeddings are not always better than simple baselines (Kedzierska et al., Genome Biology 26:101, 2025): compare with PCA on your data.",
    ]
    if version:
        lines += ["", f"Please cite: {PAPERS[version]}."]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class PretrainingFacts:
    """What a pretraining run has to say for itself."""

    config: GeneformerConfig
    corpora: Sequence[tuple[str, int, int, float, str | None]]
    """Of each dataset its name, training cells, cells to evaluate on, share, and where those are from if it is another dataset."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    started_from: str | None
    version: str
    species: str | None = None


def pretraining_card(facts: PretrainingFacts, *, name: str) -> str:
    """Return the card of a pretrained model: data, recipe and figures, with the metadata the Hub reads."""
    config, held_out = facts.config, facts.figures["held_out"]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["geneformer", "single-cell", "transcriptomics", "biology"],
        "pipeline_tag": "fill-mask",
    }
    if held_out:
        metadata["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "fill-mask", "name": "Masked-gene prediction"},
                        "dataset": {"name": found["evaluated_on"] or f"{corpus} (held out)", "type": "tokenized-cells"},
                        "metrics": [
                            {"type": key, "value": round(value, 4)}
                            for key, value in found["after"].items()
                            if key in ("loss", "perplexity", "accuracy_top1", "accuracy_top10", "loss_at_mask")
                        ],
                    }
                    for corpus, found in held_out.items()
                ],
            }
        ]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A Geneformer masked-gene model, {'continued from ' + facts.started_from if facts.started_from else 'trained from random weights'} with geneformer_hf {facts.version}.",
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, {config.num_attention_heads} heads, feed-forward {config.intermediate_size:,}; "
        f"{config.max_position_embeddings:,} tokens a cell; vocabulary of {config.vocab_size:,} tokens (gene table {config.vocabulary_fingerprint}).",
        "",
        "## Data",
        "",
        "| dataset | cells to train on | share of the cells shown | evaluated on |",
        "|---|---|---|---|",
        *(
            f"| {corpus} | {n_train:,} | {share:.1%} | {n_held:,} {'cells of ' + other if other else 'held-out cells'} |"
            for corpus, n_train, n_held, share, other in facts.corpora
        ),
        "",
        "## Recipe",
        "",
        f"{facts.figures['steps']:,} optimiser steps, {facts.figures['epochs'] or 0:.2f} epochs. All settings that differ from the defaults (`settings.yaml`):",
        "",
        "```yaml",
        yaml.safe_dump(facts.settings, sort_keys=True, allow_unicode=True).strip(),
        "```",
        "",
        "## Figures",
        "",
        *_figure_lines(held_out),
        "",
        "![Loss by step](loss.png)",
        "",
        "## Use",
        "",
        "```python",
        "import geneformer_hf  # registers the Auto classes",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'model = AutoModelForMaskedLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        f"Input: raw transcript counts{' of ' + facts.species + ' cells' if facts.species else ''}. A low masked-gene loss does not mean that embeddings serve a purpose: compare them with PCA on your data.",
        "",
        f"Please cite: {PAPERS['V1']}.",
    ]
    return "\n".join(lines) + "\n"


def verdict(found: dict[str, Any]) -> str:
    """Say in a sentence what the figures on held-out cells mean, whichever way they came out."""
    after, base = found["after"]["loss_at_mask"], min(found["baselines"]["gene_frequency_at_mask"], found["baselines"]["rank_frequency_at_mask"])
    if after >= base:
        return f"At masked genes the model is {after - base:.2f} nats worse than the better baseline: it has not learnt how genes go together. Train longer, on more cells, or with another learning rate."
    return f"At masked genes the model is {base - after:.2f} nats better than the better baseline."


def _figure_lines(held_out: dict[str, Any]) -> list[str]:
    """Return a table of losses, before and after, beside the baselines at the same hidden genes."""
    if not held_out:
        return ["None: no cells were held out."]
    lines = [
        "Losses in nats. The baselines predict each hidden gene by its smoothed frequency among training cells, overall or near that rank. Of the hidden genes, one in ten still",
        "stands where it was and can be copied; what the model knows of genes it cannot see shows at `<mask>` alone.",
        "",
        "| dataset | at | genes | loss before | loss | top-1 | top-10 | gene frequency | frequency by rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for corpus, found in held_out.items():
        after, before, base = found["after"], found["before"], found["baselines"]
        for where, suffix, genes in (("all hidden genes", "", "hidden_genes"), ("`<mask>`", "_at_mask", "hidden_by_mask")):
            numbers = [
                f"{base[genes]:,}", f"{before['loss' + suffix]:.3f}" if before else "", f"{after['loss' + suffix]:.3f}", f"{after['accuracy_top1' + suffix]:.3f}",
                f"{after['accuracy_top10' + suffix]:.3f}", f"{base['gene_frequency' + suffix]:.3f}", f"{base['rank_frequency' + suffix]:.3f}",
            ]  # fmt: skip
            lines.append(f"| {corpus} | {where} | {' | '.join(numbers)} |")
    lines += ["", *(f"{corpus}: {verdict(found)}" for corpus, found in held_out.items())]
    return lines


@dataclass(frozen=True)
class FineTuningFacts:
    """What a fine-tuning run has to say for itself."""

    config: GeneformerConfig
    what: str
    heads: Sequence[tuple[str, list[str], str]]
    """Name, classes and problem_type of each head."""
    of_genes: bool
    figures: dict[str, Any]
    compared: dict[str, tuple[str, ...]]
    """Figures that are shown, by problem_type."""
    settings: dict[str, Any]
    started_from: str | None
    is_adapter: bool
    version: str
    is_published: bool = False
    """Whether that is a repository on the Hub."""


def finetuning_card(facts: FineTuningFacts, *, name: str) -> str:
    """Return the card of a fine-tuned model or adapter: labels, figures beside baselines, recipe, with the metadata the Hub reads."""
    task = "token-classification" if facts.of_genes else "text-classification"
    metadata: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "tags": ["geneformer", "single-cell", "transcriptomics", "biology", *(["lora"] if facts.is_adapter else [])],
        "pipeline_tag": task,
    }
    if facts.started_from and facts.is_published:
        metadata["base_model"] = facts.started_from
    results = []
    for head, found in facts.figures["heads"].items():
        kind = next(k for n, _, k in facts.heads if n == head)
        shown = [
            {"type": key, "value": round(float(found["this model"][key]), 4)}
            for key in facts.compared[kind]
            if found["this model"][key] == found["this model"][key]
        ]
        results.append({"task": {"type": task, "name": head}, "dataset": {"name": "held-out test set", "type": "cells"}, "metrics": shown})
    if results:
        metadata["model-index"] = [{"name": name, "results": results}]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {'LoRA adapter of a ' if facts.is_adapter else ''}Geneformer model that predicts {'classes of genes' if facts.of_genes else facts.what}, fine-tuned with geneformer-hf {facts.version}"
        + (f" from `{facts.started_from}`." if facts.started_from else "."),
        "",
        "## Labels",
        "",
        *(f"- {head}: {', '.join(names[:60])}{' …' if len(names) > 60 else ''}" for head, names, _ in facts.heads),
        "",
        "## Figures",
        "",
        f"{facts.figures['n_train']:,} {'genes' if facts.of_genes else 'cells'} to train on, {facts.figures['n_test']:,} to test"
        + (f", in {facts.figures['folds']} folds; the model here was then trained on all of them." if facts.figures["folds"] else "."),
        *_comparison_lines(facts),
        *_occurrence_lines(facts.figures),
        "",
        *([f"Remarks:\n\n{chr(10).join(f'- {note}' for note in facts.figures['notes'])}\n"] if facts.figures["notes"] else []),
        "`report.html` has pictures and figures of each class; `predictions.csv` each prediction; `splits.csv` who was on which side.",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(facts.settings, sort_keys=True, allow_unicode=True).strip(),
        "```",
        "",
        "## Use",
        "",
        "```python",
        "import geneformer_hf",
        "",
        'predictions = geneformer_hf.predict("FOLDER", "cells.h5ad")',
        "```",
        "",
        "Research use. Labels are as good as those it was trained on, and cells unlike those it has seen get a label all the same: look at the entropy.",
        "",
        f"Please cite: {PAPERS['V1']}.",
    ]
    return "\n".join(lines) + "\n"


def _occurrence_lines(figures: dict[str, Any]) -> list[str]:
    return ["", occurrences_in_words(figures["per_occurrence"])] if "per_occurrence" in figures else []


def occurrences_in_words(each: dict[str, Any]) -> str:
    """Say how genes are classified when each counts once for every cell that expresses it, as published figures count."""
    text = f"Every gene in every cell ({each['n']:,}), as published figures count: accuracy {each['accuracy']:.3f}, macro F1 {each['macro_f1']:.3f}"
    if "mean_auc_by_length" not in each:
        return f"{text}."
    folds = f"; by fold {', '.join(f'{auc:.3f}' for auc in each['auc_of_folds'])}" if len(each["auc_of_folds"]) > 1 else ""
    return f"{text}; mean ROC AUC {each['mean_auc_by_length']:.3f} ± {each['sd_auc_by_length']:.3f} by length of the curves, {each['mean_auc_plain']:.3f} ± {each['sd_auc_plain']:.3f} plainly{folds}."


def _comparison_lines(facts: FineTuningFacts) -> list[str]:
    lines = []
    for head, found in facts.figures["heads"].items():
        keys = facts.compared[next(kind for name, _, kind in facts.heads if name == head)]
        lines += ["", f"| {head} | {' | '.join(key.replace('_', ' ') for key in keys)} |", f"|---|{'---|' * len(keys)}"]
        lines += [f"| {name} | {' | '.join(f'{float(one[key]):.3f}' for key in keys)} |" for name, one in found.items()]
    return lines
