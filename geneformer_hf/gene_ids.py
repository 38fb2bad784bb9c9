"""Names of genes: Ensembl ids and their species, human symbols, and which column of a file names its genes.

`GeneFeatures` looks at the table of features of one file. It leaves out features that are not genes, takes off prefixes of
genomes, and finds for each gene its Ensembl id, wherever in the table that is, or else its symbol.
"""

from __future__ import annotations

import csv
import gzip
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import TypeVar

import numpy as np
import scipy.sparse as sp

from .errors import ColumnNotFoundError, GeneIdError
from .feature_types import MISSING, FeatureTypes, feature_types

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In the order in which they win where several hold as many ids; the last of each is what loom files use.
ENSEMBL_COLUMNS = ("ensembl_id", "gene_ids", "feature_id", "\0index", "Accession")
SYMBOL_COLUMNS = ("gene_symbol", "feature_name", "Gene", "gene_name")
"""How columns of symbols are usually called; other spellings are known too."""
_SYMBOL_COLUMN = re.compile(r"(hgnc|gene|genes|feature|features|external|official|approved|original|short)*(symbols?|names?)|genes?|hgnc")
_ID_COLUMN = re.compile(
    r"(ensembl|ens|stable|gene|genes|feature|features|accession)+(ids?|stableids?|accessions?|identifiers?)?|ids?|stableids?|identifiers?|human"
)
"""Names of columns, without case and punctuation, whose ids are believed where the symbols of the file say otherwise."""
GENOME_COLUMNS = ("genome", "species", "organism")
UNPREFIXED = "unprefixed"
"""Genome of the genes without a prefix, where the others carry one."""
INDEX = "index"
"""What a user calls the index of var."""
_INDEX = "\0index"
"""Its place among the columns, where no column can be."""
LEAST_OF_CELL = 0.5
"""Fraction of a cell's counts in the genome that is read, in a file that mixes genomes: less is a cell of another species."""
LEAST_OF_GENOME = 0.05
"""Fraction of the genes that a genome must hold to count as one of a mixture."""

# ENSG00000141510, ENSG00000141510.18, ENSGR0000265658 (Y copy, Ensembl 75), ENSG00000182378.15_PAR_Y (GENCODE), ENSMUSG00000059552
ENSEMBL = re.compile(r"(?P<id>ENS(?P<species>[A-Z]{3,4})?G(?:R\d{10}|\d{11}))(?P<version>\.\d+)?(?P<par>[_-]PAR[_-]Y)?", re.IGNORECASE)
_INSIDE = re.compile(rf"(?<![A-Za-z0-9]){ENSEMBL.pattern}(?![A-Za-z0-9])", re.IGNORECASE)
_GENOME = re.compile(
    r"(?:refdata[-_](?:gex|cellranger)[-_])?(?P<genome>(?:grc[a-z]\d{1,3}|(?:t2t[-_]?)?chm13(?:v\d[\d.]*)?|b37|hs37d5|hg\d{1,2}|mm\d{1,2}|rn\d{1,2}|rgsc\d|danrer\d+|rhemac\d+|susscr\d+|galgal\d+|bostau\d+|sscrofa\d+"
    r"|homo[ _]?sapiens|mus[ _]?musculus|rattus[ _]?norvegicus|human|mouse|rat|pig|zebrafish|macaque)"
    r"(?:[-._](?:premrna|ensembl|gencode|gex|p\d+|\d{4}-[a-z]|\d{4}))*)[_\-:|. ]+(?P<rest>.+)",
    re.IGNORECASE | re.DOTALL,
)
_SPECIES_OF_GENOME = (
    (re.compile(r"grch|hg\d|homo|human|t2t|chm13|b37|hs37", re.IGNORECASE), "human"),
    (re.compile(r"grcm|mm\d|mus[ _]?musculus|mouse", re.IGNORECASE), "mouse"),
    (re.compile(r"rn\d|rgsc|rattus|rat$", re.IGNORECASE), "rat"),
    (re.compile(r"danrer|grcz|zebrafish", re.IGNORECASE), "zebrafish"),
    (re.compile(r"susscr|sscrofa|pig", re.IGNORECASE), "pig"),
)
_DATE = re.compile(
    r"\d{1,2}[-/. ](?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*|(?:mar|march|sep|sept|dec|oct|nov|apr|feb|jan)[-/ ]\d{1,2}"
    r"|\d{4}-\d{2}-\d{2}(?:[ T].*)?|\d{1,2}/\d{1,2}/\d{2,4}|4[0-9]{4}",
    re.IGNORECASE,
)

SPECIES_OF_PREFIX = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSSSCG": "pig",
    "ENSMMUG": "rhesus macaque",
    "ENSMFAG": "crab-eating macaque",
    "ENSPTRG": "chimpanzee",
    "ENSGGOG": "gorilla",
    "ENSCJAG": "marmoset",
    "ENSMICG": "mouse lemur",
    "ENSOCUG": "rabbit",
    "ENSBTAG": "cow",
    "ENSGALG": "chicken",
}


def canonical(match: re.Match[str]) -> str:
    """Return an Ensembl id without its version, in capitals."""
    stripped = match["id"].upper()
    # The pseudo-autosomal copy on Y: GENCODE's suffix is the R of older Ensembl releases.
    return stripped.replace("ENSG0", "ENSGR", 1) if match["par"] else stripped


def canonical_id(name: str) -> str | None:
    """Return an Ensembl id without its version; None for anything else.

    Example:
        >>> canonical_id("ENSG00000141510.18"), canonical_id("ENSG00000182378.15_PAR_Y"), canonical_id("TP53")
        ('ENSG00000141510', 'ENSGR0000182378', None)
    """
    match = ENSEMBL.fullmatch(name)
    return canonical(match) if match else None


def is_ensembl_id(name: str) -> bool:
    """Return True for an Ensembl gene id of any species, with or without a version.

    Example:
        >>> is_ensembl_id("ENSG00000141510.18"), is_ensembl_id("ENSA")
        (True, False)
    """
    return ENSEMBL.fullmatch(name) is not None


def id_inside(name: str) -> str | None:
    """Return the Ensembl id that a name is or holds, as it is spelled there; None where it holds none, or several genes.

    Example:
        >>> id_inside("hg38_1,ENSG00000010610.10,CD4"), id_inside("ENSG00000010610|CD4"), id_inside("CD4")
        ('ENSG00000010610.10', 'ENSG00000010610', None)
    """
    if ENSEMBL.fullmatch(name):
        return name
    if "ENS" not in name and "ens" not in name.lower():
        return None
    found = {canonical(match): match.group() for match in _INSIDE.finditer(name)}
    return next(iter(found.values())) if len(found) == 1 else None


def looks_like_a_date(name: str) -> bool:
    """Return True for what a spreadsheet makes of symbols such as SEPT2 and MARCH1.

    Example:
        >>> [looks_like_a_date(name) for name in ("2-Sep", "1-Mar", "Mar-01", "2021-09-02", "SEPT2", "MARCH1")]
        [True, True, True, True, False, False]
    """
    return _DATE.fullmatch(name) is not None


def species_of(ensembl_ids: Iterable[str]) -> str | None:
    """Return the species that most of these Ensembl ids belong to, by their prefix; None if there is none among them."""
    seen = _count(prefix for prefix in map(_prefix_of, ensembl_ids) if prefix)
    if not seen:
        return None
    prefix = max(seen, key=lambda p: seen[p])
    return _species_name(prefix)


def _prefix_of(ensembl_id: str) -> str:
    match = ENSEMBL.fullmatch(ensembl_id)
    return f"ENS{(match['species'] or '').upper()}G" if match else ""


def _species_name(prefix: str) -> str:
    return SPECIES_OF_PREFIX.get(prefix, f"another species ({prefix})")


def _count(items: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


@dataclass(frozen=True)
class HumanGenes:
    """The packaged table of human genes (GENCODE 48; `resources/PROVENANCE.md` says how it was made)."""

    symbol_of: dict[str, str]
    """Ensembl id to current symbol; genes without a name are left out."""
    biotype_of: dict[str, str]
    """Ensembl id to GENCODE biotype, for instance `protein_coding`."""
    ids_of_symbol: dict[str, tuple[str, ...]]
    """Current or earlier symbol to the Ensembl ids that carry it: more than one where the symbol is ambiguous."""


@lru_cache(maxsize=1)
def human_genes() -> HumanGenes:
    """Return the packaged table of human genes, read once."""
    symbol_of: dict[str, str] = {}
    biotype_of: dict[str, str] = {}
    ids_of_symbol: dict[str, tuple[str, ...]] = {}
    with resources.files("geneformer_hf.resources").joinpath("human_genes.csv.gz").open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as text:
        for row in csv.DictReader(text):
            ensembl_id, symbol = row["ensembl_id"], row["symbol"]
            biotype_of[ensembl_id] = row["biotype"]
            if symbol != ensembl_id:
                symbol_of[ensembl_id] = symbol
            for name in (symbol, *row["earlier_symbols"].split()):
                ids_of_symbol[name] = (*ids_of_symbol.get(name, ()), ensembl_id)
    return HumanGenes(symbol_of, biotype_of, ids_of_symbol)


@dataclass(frozen=True)
class NamedGenes:
    """What each gene of a file is called, and where that was read."""

    names: list[str]
    """Ensembl id where there is one, else symbol."""
    source: str
    """The column of var, for instance `var['ensembl_id']`."""
    n_filled: int = 0
    """Genes without an Ensembl id in that column, named by their symbol."""
    n_inside: int = 0
    """Ensembl ids that were found inside longer names."""
    notes: tuple[str, ...] = ()
    """What else was done with the features, for people."""

    def describe(self) -> str:
        """Return one line for people."""
        parts = [f"{len(self.names):,} genes, by {self.source}"]
        if self.n_inside:
            parts.append(f"{self.n_inside:,} Ensembl ids found inside longer names")
        if self.n_filled:
            parts.append(f"{self.n_filled:,} genes without an Ensembl id there named by symbol")
        return "; ".join([*parts, *self.notes])


class GeneFeatures:
    """The table of features of one file: which of them are genes, of which genome, and what they are called.

    Args:
        columns: the text columns of var, each of length g.
        index (length g): the index of var.
        gene_ids (`str`, *optional*): the column that names the genes, or `"index"` or its name.
        genome (`str`, *optional*): the genome to read of a file that mixes several: its name there, or a species.
        index_name (`str`, *optional*): name of the index.
        where (`str`, *optional*): the file, for messages.

    Raises:
        ColumnNotFoundError: if the column named is not there.
        GeneIdError: if no feature is a gene, nothing names the genes, or they are of several genomes and none was chosen.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[str]],
        index: Sequence[str],
        *,
        gene_ids: str | None = None,
        genome: str | None = None,
        index_name: str | None = None,
        where: str = "",
    ) -> None:
        self._where = f"{where}: " if where else ""
        self.n_columns = len(index)
        if not len(index):
            msg = f"{self._where}there are no genes: var has 0 rows."
            raise GeneIdError(msg)
        is_index = gene_ids == INDEX or (gene_ids is not None and gene_ids == index_name and gene_ids not in columns)
        self._named = _INDEX if is_index else gene_ids
        if self._named not in (None, _INDEX) and self._named not in columns:
            msg = f"{self._where}var has no column {gene_ids!r} of text. Found: {sorted(columns)}, or 'index'."
            raise ColumnNotFoundError(msg)
        self.types = feature_types({name: values for name, values in columns.items() if name != self._named}, len(index))
        kept = np.arange(len(index)) if self.types is None else np.flatnonzero(self.types.is_gene)
        if not len(kept) and self.types is not None:
            msg = (
                f"{self._where}none of its {len(index):,} features is a gene, by {self.types.source} ({', '.join(self.types.left_out)}). "
                "Geneformer reads genes; give the file with gene expression, or correct the types ('Gene Expression')."
            )
            raise GeneIdError(msg)
        rows = kept.tolist()
        texts = {name: [str(values[i]).strip() for i in rows] for name, values in {_INDEX: index, **columns}.items() if self._may_name_genes(name, values)}
        self._index_name, self._prefixed = index_name, ""
        genomes = _one_per_species(self._genomes_of(texts))
        self.genomes = {name: n for name, n in _count(name for name in genomes if name).items() if n >= max(1, LEAST_OF_GENOME * len(genomes))}
        self.genome = self._chosen(genome, texts)
        of_others = np.zeros(len(kept), dtype=bool)
        if self.genome is not None and len(self.genomes) > 1:
            of_others = np.array([bool(name) and name != self.genome for name in genomes])
        self.columns: np.ndarray | None = kept[~of_others] if len(kept) < len(index) or of_others.any() else None
        """int64: which columns of the matrix are genes of the genome; None if all are."""
        self.other_columns: np.ndarray | None = kept[of_others] if of_others.any() else None
        """int64: columns of genes of other genomes; None where there are none."""
        self.mixed_columns: np.ndarray | None = None
        """int64: columns of genes known to be of the genome, among `columns`; None where genomes are not mixed."""
        if self.other_columns is not None:
            self.mixed_columns = kept[np.array([name == self.genome for name in genomes])]
        own = np.flatnonzero(~of_others).tolist()
        self._texts = {name: [values[i] for i in own] for name, values in texts.items()}

    def _may_name_genes(self, name: str, values: Sequence[str]) -> bool:
        """Return whether a column is worth reading: it is called so, or some of its values look like ids or carry a genome."""
        if name in (_INDEX, self._named) or _SYMBOL_COLUMN.fullmatch(_plain(name)) or name.lower() in GENOME_COLUMNS:
            return True
        return any("ENS" in text.upper() or _GENOME.match(text) for text in map(str, _sample(values)))

    def _genomes_of(self, texts: dict[str, list[str]]) -> list[str]:
        """Return the genome of each gene, empty where it is not known, and take prefixes of genomes off all texts."""
        found: list[str] = [""] * len(texts[_INDEX])
        for name, values in list(texts.items()):
            some = [text for text in _sample(values) if text.lower() not in MISSING]
            if sum(_GENOME.fullmatch(text) is not None for text in some) < max(1, LEAST_OF_GENOME * len(some)):
                continue
            matches = [_GENOME.fullmatch(text) for text in values]
            self._prefixed = self._prefixed or _shown(name)
            texts[name] = [match["rest"] if match else text for match, text in zip(matches, values, strict=True)]
            found = [old or (match["genome"] if match else "") for old, match in zip(found, matches, strict=True)]
        if self._prefixed:
            bare = found.count("")
            # Some spike-ins and transgenes have no prefix; many genes without one are those of another genome.
            return [name or UNPREFIXED for name in found] if bare >= LEAST_OF_GENOME * len(found) else found
        for name in (n for column in GENOME_COLUMNS for n in texts if n.lower() == column):
            values = ["" if text.lower() in MISSING else text for text in texts[name]]
            if name.lower() == "genome" or all(species_of_genome(value) for value in set(filter(None, values))):
                return values
        for values in texts.values():
            species = [_species_name(prefix) if (prefix := _prefix_of(id_inside(text) or "")) else "" for text in values]
            if len([n for n in _count(filter(None, species)).values() if n >= LEAST_OF_GENOME * len(species)]) > 1:
                return species
        return found

    def _chosen(self, genome: str | None, texts: dict[str, list[str]]) -> str | None:
        """Return the genome to read.

        Raises:
            GeneIdError: if there are several and none was named, or not the one that was.
        """
        listed = ", ".join(f"{name} ({n:,} genes)" for name, n in self.genomes.items())
        if genome is None:
            if len(self.genomes) < 2:
                return next(iter(self.genomes), None)
            example = next((name for name in self.genomes if name != UNPREFIXED), UNPREFIXED)
            msg = (
                f"{self._where}its genes are of {len(self.genomes)} genomes: {listed}. Name the one to read with `genome={example!r}` (`--genome {example}`); "
                "cells with less than half of their counts in it are then left without genes."
            )
            raise GeneIdError(msg)
        species = {known for _, known in _SPECIES_OF_GENOME}
        found = [name for name in self.genomes if name.lower() == genome.lower()]
        found = found or [name for name in self.genomes if species_of_genome(name) == genome.lower()]
        if not found and genome.lower() in species and UNPREFIXED in self.genomes:
            found = [UNPREFIXED]
        if not found and not self.genomes and genome.lower() in species:
            # A file of one genome that does not say which.
            return None
        if len(found) != 1:
            msg = f"{self._where}no genome {genome!r}. Found: {listed or 'no genome, neither in prefixes of names nor in a column'}. {'Name one of these' if listed else 'Leave genome out'}."
            raise GeneIdError(msg)
        return found[0]

    @cached_property
    def _ids(self) -> dict[str, list[str | None]]:
        """Columns that hold Ensembl ids, and the id of each gene in them, in the order in which they win ties."""
        order = [*ENSEMBL_COLUMNS, *(name for name in self._texts if name not in ENSEMBL_COLUMNS)]
        found = {name: [id_inside(text) for text in self._texts[name]] for name in order if name in self._texts}
        return {name: ids for name, ids in found.items() if any(ids)}

    def named(self, is_known: Callable[[str], bool] | None = None) -> NamedGenes:
        """Return the name of each gene: the column named by the user, else the one that holds most Ensembl ids, gaps filled by symbol.

        Args:
            is_known (*optional*): whether a name leads to a gene of the vocabulary; without it all ids count.

        Raises:
            GeneIdError: if nothing names genes, for instance where the index only counts the columns.
        """
        notes = tuple(note for note in (self.types.describe() if self.types else "", self._genome_note()) if note)
        chosen = self._named or self._best_ids(is_known)
        if chosen is None:
            column = self._symbol_columns(is_known)[0]
            if column == _INDEX and not any(name[:1].isalpha() for name in self._texts[_INDEX][:1000]):
                found = sorted(name for name in self._texts if name != _INDEX)
                msg = (
                    f"{self._where}nothing in var names the genes: its index reads {some_of(self._texts[_INDEX])} and its text columns are {found}. "
                    f"Expected Ensembl ids in any column or the index, or symbols in one of {list(SYMBOL_COLUMNS)} or the index; "
                    "or name the column with `gene_ids=` (`--gene-ids`)."
                )
                raise GeneIdError(msg)
            names, n_filled = self._filled(column, is_known)
            return NamedGenes(names, f"symbols in {_shown(column, of=True)}", n_filled, notes=notes)
        names, n_filled = self._filled(chosen, is_known)
        ids = self._ids.get(chosen, [])
        n_inside = sum(i is not None and i != text for i, text in zip(ids, self._texts[chosen], strict=bool(ids)))
        return NamedGenes(names, _shown(chosen), n_filled, n_inside, notes)

    def _best_ids(self, is_known: Callable[[str], bool] | None) -> str | None:
        """Return the column that holds most Ensembl ids of the vocabulary; None where symbols name more genes, or contradict them.

        A column of another meaning (the nearest gene, an orthologue) holds ids as well. Unless its name is that of a column of ids, it is
        believed only where the symbols of the file, as far as both are known, lead to the same genes.
        """
        best, most = None, 0
        symbols = self._texts[self._symbol_columns(is_known)[0]]
        n_symbols = sum(map(is_known, _sample(symbols))) if is_known is not None else 0
        for name, ids in self._ids.items():
            some = _sample(ids)
            n = sum(i is not None and (is_known is None or is_known(i)) for i in some)
            if n <= most or 2 * n < n_symbols or (is_known is None and 2 * n < len(some) and not self._is_id_column(name)):
                continue
            if not self._is_id_column(name) and _contradict(some, _sample(symbols)):
                logger.warning(
                    "%s%s holds Ensembl ids of other genes than the symbols of the file, and is not used. If it names the genes, pass gene_ids=%r (--gene-ids).",
                    self._where, _shown(name), name,
                )  # fmt: skip
                continue
            best, most = name, n
        return best

    def _is_id_column(self, name: str) -> bool:
        return name == _INDEX or _ID_COLUMN.fullmatch(_plain(name)) is not None

    def _filled(self, chosen: str, is_known: Callable[[str], bool] | None) -> tuple[list[str], int]:
        """Return the names in a column, and in the other columns of names where it has none, with the number of those."""
        texts = self._texts[chosen]
        ids = self._ids.get(chosen, [None] * len(texts))
        others = [name for name in (*self._symbol_columns(is_known), *(n for n in self._ids if self._is_id_column(n))) if name != chosen]
        names, n_filled = [], 0
        for row, (found, text) in enumerate(zip(ids, texts, strict=True)):
            name = found or text
            if found is None and (text.lower() in MISSING or (is_known is not None and not is_known(text))):
                further = [(self._ids.get(other, texts)[row] if self._ids.get(other) else None) or self._texts[other][row] for other in others]
                further = [one for one in further if one.lower() not in MISSING]
                better = next((one for one in further if is_known is not None and is_known(one)), None)
                better = better or (further[0] if further and text.lower() in MISSING else None)
                if better is not None and better != name:
                    name, n_filled = better, n_filled + 1
            names.append(name)
        return names, n_filled

    def select(self, counts_ng: sp.csr_array) -> tuple[sp.csr_array, np.ndarray | None]:
        """Return the counts of the genes that are read, and the fraction of each cell's counts in the genome that is read.

        A cell with less than half of its counts in that genome is of another species; it keeps no counts, so that ambient RNA does not
        make it a cell of this one. The fractions, float64 of shape `(n,)`, are None where genomes are not mixed.
        """
        of_genes = counts_ng if self.columns is None else counts_ng[:, self.columns]
        fractions = self.genome_fractions(counts_ng)
        if fractions is not None and (others := fractions < LEAST_OF_CELL).any():
            of_genes = sp.csr_array(of_genes, copy=True)
            of_genes.data[np.repeat(others, np.diff(of_genes.indptr))] = 0
        return of_genes, fractions

    def genome_fractions(self, counts_ng: sp.csr_array) -> np.ndarray | None:
        """Return the fraction of the counts of each cell in genes of the genome that is read, among those of all genomes; None for one genome."""
        if self.other_columns is None:
            return None
        own, others = (np.asarray(counts_ng[:, some].sum(axis=1, dtype=np.float64)).ravel() for some in (self.mixed_columns, self.other_columns))
        return np.divide(own, own + others, out=np.zeros(len(own)), where=own + others > 0)

    @property
    def symbols(self) -> list[str]:
        """What else the genes are called: a column of symbols, or the index."""
        return self._texts[self._symbol_columns(None)[0]]

    def _symbol_columns(self, is_known: Callable[[str], bool] | None) -> list[str]:
        """Return the columns of symbols and the index, the one first that names most genes of the vocabulary, or is filled most."""
        named = [name for name in self._texts if name != _INDEX and _SYMBOL_COLUMN.fullmatch(_plain(name))]
        usual = {name: place for place, name in enumerate(SYMBOL_COLUMNS)}
        named.sort(key=lambda name: usual.get(name, len(usual)))

        def count(name: str) -> int:
            some = _sample(self._texts[name])
            return sum(is_known(text) for text in some) if is_known is not None else sum(text.lower() not in MISSING for text in some)

        counts = {name: count(name) for name in named}
        if is_known is not None:
            return sorted([*named, _INDEX], key=lambda name: -(counts[name] if name != _INDEX else count(_INDEX)))
        filled = [name for name in named if 2 * counts[name] >= len(_sample(self._texts[name]))]
        return [*filled, _INDEX, *(name for name in named if name not in filled)]

    def _genome_note(self) -> str:
        if self.genome is None:
            return ""
        if self.other_columns is not None:
            return f"{len(self.other_columns):,} genes of other genomes than {self.genome} left out"
        return f"prefix {self.genome!r} taken off the names in {self._prefixed}" if self._prefixed else ""


def _sample(values: Sequence[T]) -> Sequence[T]:
    """Return at most some hundreds of values, spread over all."""
    return values[:: max(1, len(values) // 500)]


def _contradict(ids: Sequence[str | None], symbols: Sequence[str]) -> bool:
    """Return whether most ids are of other genes than the symbols beside them, by the packaged table."""
    human = human_genes().ids_of_symbol
    both = [(canonical_id(i), human[symbol]) for i, symbol in zip(ids, symbols, strict=True) if i is not None and symbol in human]
    return len(both) >= 3 and 2 * sum(i in known for i, known in both) < len(both)


def _plain(name: str) -> str:
    """Return the name of a column without case and punctuation."""
    return re.sub(r"[\W_]+", "", name).lower()


def _one_per_species(genomes: list[str]) -> list[str]:
    """Return genomes in which two assemblies of one species have the name of the more frequent one."""
    counts = _count(filter(None, genomes))
    name_of: dict[str, str] = {}
    for name in sorted(counts, key=lambda n: -counts[n]):
        name_of.setdefault(species_of_genome(name) or name, name)
    return [name_of[species_of_genome(name) or name] if name else "" for name in genomes]


def species_of_genome(genome: str) -> str | None:
    """Return the species of a genome by its usual names, None for others.

    Example:
        >>> species_of_genome("GRCh38"), species_of_genome("mm10"), species_of_genome("human")
        ('human', 'mouse', 'human')
    """
    return next((species for pattern, species in _SPECIES_OF_GENOME if pattern.match(genome)), None)


def _shown(column: str, *, of: bool = False) -> str:
    if column == _INDEX:
        return "the index of var" if of else "index of var"
    return f"var[{column!r}]"


def some_of(names: Iterable[str], most: int = 3) -> str:
    """Name the first few, the start of long ones, and count the rest."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 100 else f"{name[:100]}…" for name in names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most:,} more"


__all__ = [
    "ENSEMBL",
    "SYMBOL_COLUMNS",
    "FeatureTypes",
    "GeneFeatures",
    "HumanGenes",
    "NamedGenes",
    "canonical",
    "canonical_id",
    "human_genes",
    "id_inside",
    "is_ensembl_id",
    "looks_like_a_date",
    "species_of",
    "species_of_genome",
]
