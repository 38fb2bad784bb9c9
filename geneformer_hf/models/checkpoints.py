"""Published Geneformer checkpoints: where they are, and the dictionaries that stand for their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

REPOSITORY = "ctheodoris/Geneformer"
TAGS = ["geneformer", "single-cell", "transcriptomics", "biology"]
"""By which models and datasets are found on the Hub."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    name: str
    """Name of the preset, which is also its shape in `GeneformerConfig.from_preset`."""
    subfolder: str
    """Folder in the repository."""
    version: str
    """`V1` (30 M cells, 2,048 genes) or `V2` (95 to 104 M cells, 4,096 with special tokens)."""
    repository: str = REPOSITORY
    revision: str | None = None
    """Only where a source states one; None is the newest, unpinned."""


# Commits that public users of these checkpoints name (`reports.published` says who).
_CURRENT = "f45a6c7de57ff07f946f146c254da02a90e2cdf5"
_EARLIER = "94d98d1774fc21920d2f01dbd23bc22d232a6ec2"

CHECKPOINTS: dict[str, Checkpoint] = {
    c.name: c
    for c in (
        Checkpoint("Geneformer-V1-10M", "Geneformer-V1-10M", "V1", revision=_CURRENT),
        Checkpoint("Geneformer-V2-104M", "Geneformer-V2-104M", "V2", revision=_CURRENT),
        Checkpoint("Geneformer-V2-104M_CLcancer", "Geneformer-V2-104M_CLcancer", "V2", revision=_CURRENT),
        Checkpoint("Geneformer-V2-316M", "Geneformer-V2-316M", "V2", revision=_CURRENT),
        Checkpoint("gf-6L-30M-i2048", "gf-6L-30M-i2048", "V1"),
        Checkpoint("gf-12L-30M-i2048", "gf-12L-30M-i2048", "V1"),
        Checkpoint("gf-12L-95M-i4096", "gf-12L-95M-i4096", "V2", revision=_EARLIER),
        Checkpoint("gf-12L-95M-i4096-CLcancer", "gf-12L-95M-i4096_CLcancer", "V2", revision=_EARLIER),
        Checkpoint("gf-20L-95M-i4096", "gf-20L-95M-i4096", "V2", revision=_EARLIER),
    )
}

DICTIONARY_PATTERNS = {
    "tokens": "token_dictionary*.pkl",
    "medians": "gene_median_dictionary*.pkl",
    "symbols": "gene_name_id_dict*.pkl",
    "aliases": "ensembl_mapping_dict*.pkl",
}

# SHA-256 of the published dictionaries; gc95M and gc104M are the same bytes under two names.
DICTIONARY_HASHES: dict[str, dict[str, str]] = {
    "V1": {
        "tokens": "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",
        "medians": "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
        "symbols": "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",
        "aliases": "eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869",
    },
    "V2": {
        "tokens": "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",
        "medians": "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
        "symbols": "fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1",
        "aliases": "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
    },
}

SPECIAL_TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>")

# Fingerprints of the gene tables these dictionaries make, by the size of their vocabulary.
PUBLISHED_TABLES = {25_426: "59d2b887f162d870", 20_275: "11ec609bdfdd7b94"}
