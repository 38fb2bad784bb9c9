"""What was counted in each column of a matrix: genes, or antibodies, guides, peaks and other features beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TYPE_COLUMN = re.compile(r"features?[\W_]*types?|(feature[\W_]*)?modalit(y|ies)", re.IGNORECASE)
"""Columns of var that say what was counted, without the suffix that joining tables adds (`feature_types-0`)."""
_SUFFIX = re.compile(r"([\W_]+(\d+|[xy]|rna|gex|adt|prot|batch\d*))+$", re.IGNORECASE)
MISSING = frozenset({"", "nan", "none", "<na>", "na", "n/a", "null", "-", "."})
"""What stands for a missing value in a column of text."""

_GENE_TYPES = frozenset(
    {
        *(
            "gene",
            "genes",
            "gene expression",
            "geneexpression",
            "gene exp",
            "expression",
            "gex",
            "rna",
            "mrna",
            "cdna",
            "scrna",
            "snrna",
            "scrna seq",
            "rna seq",
        ),
        *("transcript", "transcripts", "transcriptome", "transcriptomic", "transcriptomics", "whole transcriptome", "targeted gene expression"),
        *("spliced", "unspliced", "exon", "intron", "human genes", "lincrna", "antisense", "processed transcript", "sense intronic", "sense overlapping"),
        *("ig c gene", "ig c pseudogene", "ig d gene", "ig j gene", "ig j pseudogene", "ig v gene", "ig v pseudogene", "ig pseudogene"),
        *("tr c gene", "tr d gene", "tr j gene", "tr j pseudogene", "tr v gene", "tr v pseudogene", "mt rrna", "mt trna", "tec", "artifact"),
        *("lncrna", "mirna", "misc rna", "protein coding", "protein coding gene", "pseudogene", "processed pseudogene", "polymorphic pseudogene"),
        *("rrna", "rrna pseudogene", "ribozyme", "srna", "scarna", "snorna", "vault rna", "vaultrna", "translated processed pseudogene"),
        *("transcribed processed pseudogene", "transcribed unitary pseudogene", "transcribed unprocessed pseudogene", "unitary pseudogene"),
        *("unprocessed pseudogene", "non coding", "3prime overlapping ncrna", "bidirectional promoter lncrna", "macro lncrna", "ncrna", "scrna gene"),
        *("retained intron", "nonsense mediated decay", "non stop decay", "pseudo", "c region", "d segment", "j segment", "v segment", "c gene segment"),
    }
)
"""Names of RNA in 10x, muon and Seurat files, and biotypes of GENCODE, which some files keep in a column `feature_type`."""
_OTHER_WORDS = frozenset(
    {
        *(
            "ab",
            "abs",
            "adt",
            "adts",
            "antibody",
            "antibodies",
            "antigen",
            "antigens",
            "protein",
            "proteins",
            "prot",
            "proteomics",
            "cite",
            "citeseq",
            "totalseq",
        ),
        *("hto", "htos", "hashtag", "hashtags", "hashing", "multiplexing", "cmo", "lmo", "oligo", "isotype", "tag", "tags", "barcode", "barcodes"),
        *(
            "crispr",
            "guide",
            "guides",
            "grna",
            "sgrna",
            "perturbation",
            "perturbations",
            "peak",
            "peaks",
            "atac",
            "chromatin",
            "accessibility",
            "tile",
            "tiles",
        ),
        *("fragment", "fragments", "motif", "motifs", "vdj", "tcr", "bcr", "custom", "control", "controls", "blank", "codeword", "codewords", "probe"),
        *("unassigned", "spike", "spikein", "ercc", "methylation", "metabolite", "metabolites", "lipid", "lipids", "image", "morphology"),
    }
)
_RNA_WORDS = frozenset({"gene", "genes", "rna", "gex", "mrna", "expression", "transcript", "transcripts", "transcriptome"})


def kind_of_feature(name: str) -> str:
    """Return what a feature type means: `gene`, `other`, `missing` or `unknown`.

    Example:
        >>> [kind_of_feature(t) for t in ("Gene Expression", "GEX", "Antibody Capture", "prot", "protein_coding", "Surface", "nan")]
        ['gene', 'gene', 'other', 'other', 'gene', 'unknown', 'missing']
    """
    # A type cut by a tab, or followed by columns that belong to the next field.
    text = name.split("\t", maxsplit=1)[0].strip().strip("'\"").lower()
    if text in MISSING:
        return "missing"
    plain = " ".join(re.split(r"[\W_]+", text)).strip()
    if plain in _GENE_TYPES or plain.startswith("protein coding"):
        return "gene"
    words = set(plain.split())
    if words & _OTHER_WORDS:
        return "other"
    return "gene" if words & _RNA_WORDS or plain.endswith(("pseudogene", "rna")) else "unknown"


@dataclass(frozen=True)
class FeatureTypes:
    """Which columns of a matrix are genes, by the types that its table of features gives."""

    is_gene: np.ndarray
    """bool of shape `(g,)`."""
    source: str
    """The columns of var that say so."""
    left_out: dict[str, int]
    """Other types and their numbers of features."""
    unknown: tuple[str, ...]
    """Those of them that are not known to be genes or anything else."""
    n_untyped: int = 0
    """Features without a type, which are taken for genes."""

    def describe(self) -> str:
        """Return one phrase for people; empty where all features are genes."""
        if not self.left_out:
            return ""
        counted = ", ".join(f"{kind} {n:,}" for kind, n in self.left_out.items())
        untyped = f", and {self.n_untyped:,} without a type taken for genes" if self.n_untyped else ""
        return f"{sum(self.left_out.values()):,} features that are not genes left out, by {self.source} ({counted}){untyped}"


def feature_types(columns: Mapping[str, Sequence[str]], n_features: int) -> FeatureTypes | None:
    """Return which features are genes; None where no column of the table says what was counted.

    A column counts by its name (`feature_types`, `modality`, with or without a suffix), or because every value is a known
    type and both genes and something else are among them. Where several do, a feature is a gene only if none of them says
    otherwise. Features without a type are taken for genes.

    Args:
        columns: the text columns of var.
        n_features (`int`): its rows.
    """
    found = [name for name in columns if (TYPE_COLUMN.fullmatch(_SUFFIX.sub("", name)) and _holds_values(columns[name])) or _holds_types(columns[name])]
    if not found:
        return None
    kinds: dict[str, str] = {}
    types: list[str] = [""] * n_features
    for name in found:
        for row, value in enumerate(columns[name]):
            text = str(value)
            kind = kinds.setdefault(text, kind_of_feature(text))
            if kind != "missing" and (not types[row] or (kinds[types[row]] == "gene" and kind != "gene")):
                types[row] = text
    is_gene = np.array([not text or kinds[text] == "gene" for text in types], dtype=bool)
    left_out: dict[str, int] = {}
    for text, gene in zip(types, is_gene.tolist(), strict=True):
        if not gene:
            shown = text.split("\t", maxsplit=1)[0].strip()
            left_out[shown] = left_out.get(shown, 0) + 1
    unknown = tuple(dict.fromkeys(text.split("\t", maxsplit=1)[0].strip() for text in types if text and kinds[text] == "unknown"))
    return FeatureTypes(is_gene, " and ".join(f"var[{name!r}]" for name in found), left_out, unknown, types.count(""))


def _holds_values(values: Sequence[str]) -> bool:
    """Return whether anything stands in a column."""
    return any(kind_of_feature(text) != "missing" for text in {str(value) for value in values})


def _holds_types(values: Sequence[str]) -> bool:
    """Return whether a column without a telling name holds types of features: known ones alone, genes and others among them."""
    distinct: set[str] = set()
    for value in values:
        distinct.add(str(value))
        if len(distinct) > 20:
            return False
    kinds = {kind_of_feature(value) for value in distinct}
    return "unknown" not in kinds and {"gene", "other"} <= kinds
