"""Model cards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as metadata_version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.dataset_cards import card, parts_of
from ..escaping import code, fenced, markdown
from ..models.checkpoints import REPOSITORY, TAGS
from ..models.configuration_geneformer import GeneformerConfig
from ..models.modeling_geneformer import GeneformerForMaskedLM
from ..models.places import Place
from .published import CITATIONS, Facts

PIPELINE_TAGS = {
    "GeneformerForMaskedLM": "fill-mask",
    "GeneformerForSequenceClassification": "text-classification",
    "GeneformerForMultiTaskClassification": "text-classification",
    "GeneformerForTokenClassification": "token-classification",
}


def checkpoint_card(
    config: GeneformerConfig, *, title: str, vocabulary: str, place: Place, version: str | None, facts: Facts | None = None, folder: str = "FOLDER"
) -> str:
    """Return the card of a converted checkpoint as Markdown with the metadata the Hub reads.

    Args:
        title (`str`): heading.
        vocabulary (`str`): genes and special tokens, for people.
        place (`Place`): where the checkpoint comes from; folders of this disk are not named.
        version (`"V1"`, `"V2"` or None): which generation, None for dictionaries of somebody's own.
        facts (`Facts`, *optional*): what is known of a published one.
        folder (`str`, *optional*): what to open in the example.
    """
    architecture = (config.architectures or ["GeneformerForMaskedLM"])[0].replace("Bert", "Geneformer", 1)
    metadata = ModelCardData(
        license="apache-2.0" if place.name == REPOSITORY else None,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS.get(architecture),
        base_model=None if place.is_local else place.name,
        datasets=[facts.dataset] if facts and facts.dataset else None,
        tags=TAGS,
    )
    with torch.device("meta"):
        # A model that is there can be counted better.
        parameters = GeneformerForMaskedLM(config).num_parameters() if architecture == "GeneformerForMaskedLM" else None
    text = _template("checkpoint.md.j2").render(
        config=config,
        title=markdown(title),
        vocabulary=vocabulary,
        place=place,
        origin=f"a local folder ({markdown(place.subfolder or Path(place.name).name)})" if place.is_local else None,
        architecture=architecture,
        is_published=place.name == REPOSITORY,
        parameters=parameters,
        version=version,
        facts=facts,
        folder=folder,
        citations=[CITATIONS[key] for key in (facts.citations if facts else (version,) if version else ())],
        has_ends=config.cls_token_id is not None,
    )
    return card(metadata, text)


def plain_card(kind: str, config: GeneformerConfig | None, *, name: str, base: str | None = None) -> str:
    """Return the card of a model, adapter or tokenizer of which nothing is known but what its folder says."""
    metadata = ModelCardData(library_name="peft" if kind == "adapter" else "transformers", base_model=base, tags=TAGS)
    lines = [f"# {markdown(name)}", "", f"A Geneformer {kind}{f' of {markdown(base)}' if base else ''}, shared with geneformer_hf."]
    if config is not None:
        lines += [
            "",
            f"{markdown((config.architectures or ['Geneformer'])[0])}: {config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, {config.max_position_embeddings:,} tokens a cell, vocabulary of {config.vocab_size:,}.",
        ]
    lines += ["", "How it was made, on which data and with what result was not recorded: its owner should say so here."]
    return card(metadata, "\n".join(lines))


def with_base_model(text: str, base: str) -> str:
    """Return a card that names the model it was made from, if it did not yet."""
    # Refuses metadata that would grow without bound.
    parts_of(text)
    found = ModelCard(text, ignore_metadata_errors=True)
    if found.data.get("base_model") is None:
        found.data["base_model"] = base
    return str(found)


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what comes out of a run, of those that are installed."""
    names = ("geneformer-hf", "torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes")
    found = {}
    for name in names:
        try:
            found[name] = metadata_version(name)
        except PackageNotFoundError:
            continue
    return found


def _template(name: str) -> jinja2.Template:
    text = (resources.files("geneformer_hf.reports") / name).read_text(encoding="utf-8")
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)


@dataclass(frozen=True)
class PretrainingFacts:
    """What a pretraining run has to say for itself."""

    config: GeneformerConfig
    corpora: Sequence[tuple[str, int, int, float, str | None]]
    """Of each dataset its name, training cells, cells to evaluate on, share, and where those are from if it is another dataset."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    started_from: str | None
    seed: int
    base_model: str | None = None
    """Repository on the Hub that training started from."""
    datasets: Sequence[str] = ()
    """Repositories on the Hub that the cells are from."""
    species: str | None = None


def pretraining_card(facts: PretrainingFacts, *, name: str) -> str:
    """Return the card of a pretrained model: data, recipe and figures, with the metadata the Hub reads."""
    config, held_out = facts.config, facts.figures["held_out"]
    metadata = ModelCardData(
        library_name="transformers",
        tags=TAGS,
        pipeline_tag="fill-mask",
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="fill-mask",
                task_name="Masked-gene prediction",
                dataset_type="tokenized-cells",
                dataset_name=found["evaluated_on"] or f"{corpus} (held out)",
                metric_type=key,
                metric_value=round(value, 4),
            )
            for corpus, found in held_out.items()
            for key, value in found["after"].items()
            if key in ("loss", "perplexity", "accuracy_top1", "accuracy_top10", "loss_at_mask")
        ]
        or None,
    )
    lines = [
        f"# {markdown(name)}",
        "",
        f"A Geneformer masked-gene model, {'continued from ' + markdown(facts.started_from) if facts.started_from else 'trained from random weights'}.",
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, {config.num_attention_heads} heads, feed-forward {config.intermediate_size:,}; "
        f"{config.max_position_embeddings:,} tokens a cell; vocabulary of {config.vocab_size:,} tokens (gene table {config.vocabulary_fingerprint}).",
        "",
        "## Data",
        "",
        "| dataset | cells to train on | share of the cells shown | evaluated on |",
        "|---|---|---|---|",
        *(
            f"| {markdown(corpus)} | {n_train:,} | {share:.1%} | {n_held:,} {'cells of ' + markdown(other) if other else 'held-out cells'} |"
            for corpus, n_train, n_held, share, other in facts.corpora
        ),
        "",
        "## Recipe",
        "",
        f"{facts.figures['steps']:,} optimiser steps, {facts.figures['epochs'] or 0:.2f} epochs; seed {facts.seed}. {_made_with()} All settings that differ from the defaults (`settings.yaml`):",
        "",
        fenced(yaml.safe_dump(facts.settings, sort_keys=True, allow_unicode=True).strip(), "yaml"),
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
        f"Please cite: {CITATIONS['V1']}",
    ]
    return card(metadata, "\n".join(lines))


def _made_with() -> str:
    return f"Made with {', '.join(f'{name} {version}' for name, version in versions().items())}."


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
            lines.append(f"| {markdown(corpus)} | {where} | {' | '.join(numbers)} |")
    lines += ["", *(f"{markdown(corpus)}: {verdict(found)}" for corpus, found in held_out.items())]
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
    seed: int
    split_lines: Sequence[str] = ()
    """How cells or genes were parted."""
    base_model: str | None = None
    """Repository on the Hub that training started from."""
    datasets: Sequence[str] = ()
    """Repositories on the Hub that the cells are from."""


def finetuning_card(facts: FineTuningFacts, *, name: str) -> str:
    """Return the card of a fine-tuned model or adapter: labels, figures beside baselines, recipe, with the metadata the Hub reads."""
    task = "token-classification" if facts.of_genes else "text-classification"
    results = []
    for head, found in facts.figures["heads"].items():
        kind = next(k for n, _, k in facts.heads if n == head)
        for key in facts.compared[kind]:
            value = float(found["this model"][key])
            if math.isfinite(value):
                results.append(
                    EvalResult(
                        task_type=task, task_name=head, dataset_type="cells", dataset_name="held-out test set", metric_type=key, metric_value=round(value, 4)
                    )
                )
    metadata = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        tags=[*TAGS, *(["lora"] if facts.is_adapter else [])],
        pipeline_tag=task,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        model_name=name,
        eval_results=results or None,
    )
    lines = [
        f"# {markdown(name)}",
        "",
        f"A {'LoRA adapter of a ' if facts.is_adapter else ''}Geneformer model that predicts {'classes of genes' if facts.of_genes else markdown(facts.what)}, fine-tuned"
        + (f" from {code(facts.started_from)}." if facts.started_from else "."),
        "",
        "## Labels",
        "",
        *(f"- {markdown(head)}: {', '.join(map(markdown, names[:60]))}{' …' if len(names) > 60 else ''}" for head, names, _ in facts.heads),
        "",
        "## Figures",
        "",
        f"{facts.figures['n_train']:,} {'genes' if facts.of_genes else 'cells'} to train on, {facts.figures['n_test']:,} to test"
        + (f", in {facts.figures['folds']} folds; the model here was then trained on all of them." if facts.figures["folds"] else "."),
        *_comparison_lines(facts),
        *_occurrence_lines(facts.figures),
        "",
        *([f"Remarks:\n\n{chr(10).join(f'- {markdown(note)}' for note in facts.figures['notes'])}\n"] if facts.figures["notes"] else []),
        "`report.html` has pictures and figures of each class; `predictions.csv` each prediction; `splits.csv` who was on which side.",
        "",
        *(["## Split", "", *(f"- {markdown(line)}" for line in facts.split_lines), ""] if facts.split_lines else []),
        "## Recipe",
        "",
        f"Seed {facts.seed}. {_made_with()} All settings that differ from the defaults (`settings.yaml`):",
        "",
        fenced(yaml.safe_dump(facts.settings, sort_keys=True, allow_unicode=True).strip(), "yaml"),
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
        f"Please cite: {CITATIONS['V1']}",
    ]
    return card(metadata, "\n".join(lines))


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
        lines += ["", f"| {markdown(head)} | {' | '.join(key.replace('_', ' ') for key in keys)} |", f"|---|{'---|' * len(keys)}"]
        lines += [f"| {markdown(name)} | {' | '.join(f'{float(one[key]):.3f}' for key in keys)} |" for name, one in found.items()]
    return lines
