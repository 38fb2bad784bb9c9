"""Model cards."""

from __future__ import annotations

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
