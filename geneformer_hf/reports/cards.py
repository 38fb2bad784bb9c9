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
    corpora: Sequence[tuple[str, int, int, float]]
    """Name, training cells, held-out cells and share of each dataset."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    started_from: str | None
    version: str


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
                        "dataset": {"name": f"{corpus} (held out)", "type": "tokenized-cells"},
                        "metrics": [
                            {"type": key, "value": round(value, 4)}
                            for key, value in found["after"].items()
                            if key in ("loss", "perplexity", "accuracy_top1", "accuracy_top10")
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
        "| dataset | cells to train on | held out | share of the cells shown |",
        "|---|---|---|---|",
        *(f"| {corpus} | {n_train:,} | {n_held:,} | {share:.1%} |" for corpus, n_train, n_held, share in facts.corpora),
        "",
        "## Recipe",
        "",
        f"{facts.figures['steps']:,} optimiser steps, {facts.figures['epochs'] or 0:.2f} epochs. All settings that differ from the defaults (`run.yaml`):",
        "",
        "```yaml",
        yaml.safe_dump(facts.settings, sort_keys=True, allow_unicode=True).strip(),
        "```",
        "",
        "## Figures on held-out cells",
        "",
        *_figure_lines(held_out),
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
        "Input: raw transcript counts of human cells. A low masked-gene loss does not mean that embeddings serve a purpose: compare them with PCA on your data.",
        "",
        f"Please cite: {PAPERS['V1']}.",
    ]
    return "\n".join(lines) + "\n"


def _figure_lines(held_out: dict[str, Any]) -> list[str]:
    """Return a table of losses, before and after, beside the baselines at the same hidden genes."""
    if not held_out:
        return ["None: no cells were held out."]
    lines = [
        "Losses in nats. The baselines predict each hidden gene by its smoothed frequency among training cells, overall or near that rank.",
        "",
        "| dataset | loss before | loss | perplexity | top-1 | top-10 | gene frequency | frequency by rank | hidden genes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for corpus, found in held_out.items():
        after, before, base = found["after"], found["before"], found["baselines"]
        numbers = [
            f"{before['loss']:.3f}" if before else "",
            f"{after['loss']:.3f}", f"{after['perplexity']:,.0f}", f"{after['accuracy_top1']:.3f}", f"{after['accuracy_top10']:.3f}",
            f"{base['gene_frequency']:.3f}", f"{base['rank_frequency']:.3f}", f"{base['hidden_genes']:,}",
        ]  # fmt: skip
        lines.append(f"| {corpus} | {' | '.join(numbers)} |")
    return lines
