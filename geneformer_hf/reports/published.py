"""What public sources say of the published checkpoints: the facts of their cards, each with its source.

Only what was measured on a checkpoint itself stands under it; figures of models that others have trained anew do not.
"""

from __future__ import annotations

from dataclasses import dataclass

UPSTREAM_CARD = "README of ctheodoris/Geneformer on the Hub"
NATURE = "Theodoris et al. 2023, Nature 618:616, doi:10.1038/s41586-023-06139-9"
PREPRINT = "Chen et al. 2024, bioRxiv, doi:10.1101/2024.08.16.608180"
HELICAL_CARD = "Helical's model card of Geneformer"
HELICAL_SERIES = "Helical, notebook Geneformer-Series-Comparison"
NOTEBOOKS = "example notebooks of ctheodoris/Geneformer"
KEDZIERSKA = "Kedzierska et al. 2025, Genome Biology 26:101, doi:10.1186/s13059-025-03574-x"

CITATIONS = {
    "V1": "Theodoris CV, Xiao L, Chopra A, Chaffin MD, Al Sayed ZR, Hill MC, Mantineo H, Brydon EM, Zeng Z, Liu XS, Ellinor PT. Transfer learning enables predictions in network biology. Nature 618, 616-624 (2023). doi:10.1038/s41586-023-06139-9",
    "V2": "Chen H, Venkatesh MS, Gómez Ortega J, Mahesh SV, Nandi TN, Madduri RK, Pelka K, Theodoris CV. Scaling and quantization of large-scale foundation model enables resource-efficient predictions in network biology. Nature Computational Science 6, 450-463 (2026). doi:10.1038/s43588-026-00972-4",
    "preprint": "Chen H, Venkatesh MS, Gómez Ortega J, Mahesh SV, Nandi TN, Madduri RK, Pelka K, Theodoris CV. Quantized multi-task learning for context-specific representations of gene network dynamics. bioRxiv (2024). doi:10.1101/2024.08.16.608180",
}


@dataclass(frozen=True)
class Figure:
    """A published figure of a checkpoint."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint beyond its configuration."""

    corpus: str
    use: str
    citations: tuple[str, ...]
    """Keys of `CITATIONS`."""
    figures: tuple[Figure, ...] = ()
    limitations: tuple[str, ...] = ()
    weights_sha256: str | None = None
    """As public users of the checkpoint state it."""
    revision_source: str | None = None
    same_as: str | None = None
    """Another name of the same weights."""
    dataset: str | None = None
    """Where the corpus is on the Hub, if it is there."""


_ON_THE_HUB = {"30M": "ctheodoris/Genecorpus-30M", "104M": "theodoris-lab/Genecorpus-104M"}
_GENECORPUS_30M = (
    "Genecorpus-30M, June 2021: 29.9 million human single-cell transcriptomes of 561 droplet data sets, 27.4 million after quality control (counts and mitochondrial "
    "share within 3 standard deviations of the data set, at least 7 detected genes). Malignant and immortalised cells were left out. (Dataset card of Genecorpus-30M; Nature 2023.)"
)
_95M = "About 95 million human single-cell transcriptomes, April 2024; cancer left out. (README upstream; preprint 2024.)"
_104M = "About 104 million human single-cell transcriptomes (Genecorpus-104M), December 2024; cancer left out. (README upstream.)"
_CANCER = " Then continual learning on about 14 million cells of cancer studies. (README upstream.)"

_BASE = "The base for general analysis: embeddings, cell types, gene classes, disease states and perturbation of cells that are not from tumours."
_TUNED = "The cancer-tuned variant: tumour microenvironments, and perturbations that look for factors that shift cells towards tumour-restricting or immune-activating states. For other tissue take the base. (Helical's model card says so; the authors call it domain-tuned.)"

_SCIPLEX = "drug label of SciPlex2 cells by ridge regression on zero-shot embeddings, random fifth of the cells held out: accuracy / weighted F1"
_V1_FIGURES = (
    Figure("dosage-sensitive transcription factors, fine-tuned, five folds: area under the curve", "0.91 ± 0.02", NATURE),
    Figure("the same, from the public notebook, 10,000 cells", "0.914 ± 0.032", NOTEBOOKS),
    Figure("bivalent against non-methylated genes, fine-tuned: area under the curve", "0.93 ± 0.07", NATURE),
    Figure("bivalent against Lys4-only genes, fine-tuned: area under the curve", "0.88 ± 0.09", NATURE),
    Figure("long- against short-range transcription factors, fine-tuned: area under the curve", "0.74 ± 0.08", NATURE),
    Figure("central against peripheral genes of the NOTCH1 network, fine-tuned: area under the curve", "0.81 ± 0.06", NATURE),
    Figure("cardiomyopathies, fine-tuned, individuals held out: accuracy", "90%", NATURE),
    Figure("the same, from the public notebook: accuracy / macro F1", "0.864 / 0.843", NOTEBOOKS),
    Figure(_SCIPLEX, "0.658 / 0.642", HELICAL_SERIES),
)
_ZERO_SHOT = (
    "Without fine-tuning this model was below highly variable genes, Harmony and scVI at separating cell types, and last at mixing batches (Kedzierska et al. 2025, Genome Biology 26:101).",
)
_94D9 = "public users who download this checkpoint at this commit and state its hash"
_F45A = "NVIDIA's bionemo-recipes load this checkpoint at this commit"

FACTS: dict[str, Facts] = {
    "Geneformer-V1-10M": Facts(
        _GENECORPUS_30M, f"{_BASE} The smallest, and the one the 2023 paper reports: for laptops, and to compare with published figures.", ("V1",), _V1_FIGURES, _ZERO_SHOT,
        "a5e33a757431643b3697de7ef6127950cdc49e06e58d4266b3a3ab191b683f14", _F45A, "gf-6L-30M-i2048", _ON_THE_HUB["30M"],
    ),
    "gf-6L-30M-i2048": Facts(
        _GENECORPUS_30M, f"{_BASE} The smallest, and the one the 2023 paper reports: for laptops, and to compare with published figures.", ("V1",), _V1_FIGURES, _ZERO_SHOT,
        "a5e33a757431643b3697de7ef6127950cdc49e06e58d4266b3a3ab191b683f14", same_as="Geneformer-V1-10M", dataset=_ON_THE_HUB["30M"],
    ),
    "gf-12L-30M-i2048": Facts(_GENECORPUS_30M, f"{_BASE} Twice the depth of the paper's model, on the same cells.", ("V1",), dataset=_ON_THE_HUB["30M"]),
    "gf-12L-95M-i4096": Facts(
        _95M, f"{_BASE} Of the second generation, and small: it sees 4,096 tokens of a cell at the cost of the first generation's larger model.", ("preprint",),
        (Figure(_SCIPLEX, "0.698 / 0.685", HELICAL_SERIES),), (), "4365ba23e393fcfa0e65a94ac64a0983cd788bd23a8d4914f4ab66f85cfe043c", _94D9,
    ),
    "gf-12L-95M-i4096-CLcancer": Facts(_95M + _CANCER, f"{_TUNED} Its base is gf-12L-95M-i4096.", ("preprint",), revision_source="listings of this commit, which hold the folder"),
    "gf-20L-95M-i4096": Facts(_95M, f"{_BASE} The deepest; followed by Geneformer-V2-104M and Geneformer-V2-316M.", ("preprint",), revision_source="listings of this commit, which hold the folder"),
    "Geneformer-V2-104M": Facts(
        _104M, f"{_BASE} The one to begin with on a GPU.", ("V2",), (Figure(_SCIPLEX, "0.724 / 0.712", HELICAL_SERIES),), (),
        "fff5cba29ddd8792991fa77b4872246fbe548a178cebda3775cdc72b67780e7f", _F45A, dataset=_ON_THE_HUB["104M"],
    ),
    "Geneformer-V2-104M_CLcancer": Facts(_104M + _CANCER, f"{_TUNED} Its shape is that of Geneformer-V2-104M.", ("preprint", "V2"), revision_source=_F45A, dataset=_ON_THE_HUB["104M"]),
    "Geneformer-V2-316M": Facts(
        _104M, f"{_BASE} The largest, and the default of the published repository: where a little more accuracy is worth three times the computing.", ("V2",),
        (Figure(_SCIPLEX, "0.726 / 0.716", HELICAL_SERIES),), (), "965ceccea81953d362081ef3843560a0e4fef88d396c28017881f1e94b1246f3", _F45A, dataset=_ON_THE_HUB["104M"],
    ),
}  # fmt: skip
