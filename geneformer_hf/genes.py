"""Genes: the table of a vocabulary, and how the genes of a file find their tokens.

`GeneTable` holds what a tokenizer knows of each gene: Ensembl id, token id, non-zero median, symbol, and the retired ids
and symbols that lead to it. `GeneTable.resolve` matches the gene names of a file against it and reports what happened to
every one of them. Which column of a file names its genes is decided in `gene_ids`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, GeneIdError, UnknownGeneError
from .gene_ids import ENSEMBL, GeneFeatures, NamedGenes, canonical, human_genes, looks_like_a_date, some_of, species_of
from .input_files import read_text

FORMAT = "geneformer_hf.gene_table"
FORMAT_VERSION = 1

MIN_OVERLAP = 0.05
"""Least fraction of a file's genes that must be in the vocabulary, unless the file covers that of the vocabulary below."""
MIN_COVERAGE = 0.25
_NUMBERED = re.compile(r"(gene|feature|transcript|var|variable|column|col|[gfvx])?[_.\- ]?\d+", re.IGNORECASE)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_COLUMNS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("ensembl_id", lambda v: _is_text(v) and v != "", "Ensembl ids"),
    ("token_id", lambda v: _is_whole(v) and 0 <= v < 1 << 24, "whole numbers from 0 to 16,777,215"),
    ("median", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < float("inf"), "numbers above 0"),
    ("symbol", _is_text, "texts"),
)
"""Columns of a gene table as JSON, and what each may hold."""


def _require_values(values: Any, fits: Callable[[Any], bool], what: str, expected: str) -> None:
    """Raise unless this is a list of fitting values.

    Raises:
        CheckpointError: naming the first that is not.
    """
    wrong = None if isinstance(values, list) else f"is {_short(values)}"
    if wrong is None:
        place = next((i for i, value in enumerate(values) if not fits(value)), None)
        wrong = None if place is None else f"holds {_short(values[place])} at place {place:,}"
    if wrong is not None:
        msg = f"{what} {wrong}; expected a list of {expected}. Make the table again with `geneformer-hf medians` or `convert`."
        raise CheckpointError(msg)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}…"


@dataclass(frozen=True)
class GeneReport:
    """What became of the genes of one file."""

    source: str
    """Where the names were read, for instance `var['ensembl_id']`."""
    n_genes: int
    """Columns of the count matrix."""
    n_mapped: int
    """Columns that reached a gene of the vocabulary."""
    n_tokens: int
    """Distinct genes of the vocabulary reached; less than `n_mapped` where columns were summed."""
    n_retired: int = 0
    """Columns whose id or symbol led to another id through the mapping."""
    n_versioned: int = 0
    """Columns whose version suffix was taken off."""
    n_symbols: int = 0
    """Columns mapped by symbol."""
    ambiguous: tuple[str, ...] = ()
    """Symbols that several genes of the vocabulary carry; left out."""
    unknown: tuple[str, ...] = ()
    """Names that led to no gene of the vocabulary; left out."""
    n_filled: int = 0
    """Columns without an Ensembl id in the column of ids, named by their symbol."""
    n_inside: int = 0
    """Ensembl ids that were found inside longer names."""
    n_dotted: int = 0
    """Symbols whose dashes R had turned into dots."""
    notes: tuple[str, ...] = ()
    """What else was done with the features of the file: other types and other genomes left out."""
    species_code: str = ""
    """Species of the vocabulary as in its Ensembl ids: empty for human, `MUS` for mouse."""

    @property
    def n_summed(self) -> int:
        """Columns added to another column of the same gene."""
        return self.n_mapped - self.n_tokens

    def numbers(self) -> dict[str, Any]:
        """Return what names the genes and what became of them, as numbers and lists of at most ten names."""
        counts = {name: value for name, value in vars(self).items() if name.startswith("n_")}
        names = {name: list(getattr(self, name))[:10] for name in ("ambiguous", "unknown")}
        return {"source": self.source, **counts, "n_ambiguous": len(self.ambiguous), "n_unknown": len(self.unknown), **names, "notes": list(self.notes)}

    def describe(self) -> str:
        """Return one line for people."""
        parts = [f"{self.n_mapped:,} of {self.n_genes:,} genes in the vocabulary, by {self.source}"]
        if self.n_inside:
            parts.append(f"{self.n_inside:,} Ensembl ids found inside longer names")
        if self.n_filled:
            parts.append(f"{self.n_filled:,} genes without an Ensembl id there looked up by symbol")
        if self.n_symbols:
            parts.append(f"{self.n_symbols:,} by symbol")
        if self.n_dotted:
            parts.append(f"{self.n_dotted:,} symbols with dots for dashes, as R writes them")
        if self.n_versioned:
            parts.append(f"{self.n_versioned:,} version suffixes taken off")
        if self.n_retired:
            parts.append(f"{self.n_retired:,} retired or alternative names")
        if self.n_summed:
            parts.append(f"{self.n_summed:,} columns summed into another of the same gene")
        if self.ambiguous:
            parts.append(f"{len(self.ambiguous):,} ambiguous symbols left out ({some_of(self.ambiguous)})")
        unknown = [name for name in self.unknown if name]
        if len(unknown) < len(self.unknown):
            parts.append(f"{len(self.unknown) - len(unknown):,} columns without a gene name left out")
        if unknown:
            parts.append(f"{len(unknown):,} not in the vocabulary left out ({some_of(unknown)})")
        dates = [name for name in unknown if looks_like_a_date(name)]
        if dates:
            parts.append(f"{len(dates):,} of these are dates ({some_of(dates)}), which a spreadsheet makes of symbols such as SEPT2 and MARCH1")
        strange = [name for name in self.unknown if (match := ENSEMBL.fullmatch(name)) and (match["species"] or "") != self.species_code]
        if strange:
            parts.append(f"{len(strange):,} of these are {species_of(strange)} Ensembl ids")
        parts += self.notes
        return "; ".join(parts)


@dataclass(frozen=True)
class GeneColumns:
    """The columns of a count matrix matched to a gene table.

    A slot is a distinct gene of the vocabulary that the file holds, numbered by first appearance.
    """

    slot_of_column: np.ndarray
    """int32 of shape `(g,)`: slot of each column, -1 where it is left out."""
    token_ids: np.ndarray
    """int32 of shape `(s,)`: token id of each slot."""
    medians: np.ndarray
    """float64 of shape `(s,)`: median of each slot."""
    report: GeneReport

    @cached_property
    def token_of_column(self) -> np.ndarray:
        """int32 of shape `(g,)`: token id of each column, -1 where it is left out."""
        return np.append(self.token_ids, np.int32(-1))[self.slot_of_column]

    @cached_property
    def medians_of_column(self) -> np.ndarray:
        """float64 of shape `(g,)`: median of each column, infinite where it is left out."""
        return np.append(self.medians, np.inf)[self.slot_of_column]

    @property
    def has_merges(self) -> bool:
        """True if several columns share a slot and must be summed."""
        return self.report.n_summed > 0


@dataclass(frozen=True, eq=False)
class GeneTable:
    """The genes of one vocabulary.

    Args:
        ensembl_ids (`Sequence[str]` of length g): one per gene, distinct.
        token_ids (`Sequence[int]` of length g): distinct, not negative.
        medians (`Sequence[float]` of length g):
            Median over the corpus of the gene's non-zero values, in counts per 10,000; positive.
        symbols (`Sequence[str]`, *optional*): empty where a gene has no name.
        aliases (`Mapping[str, str]`, *optional*):
            Retired Ensembl id or upper-case symbol to the Ensembl id in this table.
        species (`str`, *optional*, defaults to `"human"`): decides whether the packaged human symbols may be used.
        source (`str`, *optional*): where the medians come from, for people.

    Raises:
        ValueError: if lengths differ, ids repeat, or a median is not a positive number.

    Example:
        >>> table = GeneTable(["ENSG00000141510", "ENSG00000111640"], [4, 5], [1.2, 3.4], ["TP53", "GAPDH"])
        >>> table.resolve(["ENSG00000111640.16", "TP53", "ENSG00000000001"], source="index").token_ids
        array([5, 4], dtype=int32)
    """

    ensembl_ids: Sequence[str]
    token_ids: Any
    medians: Any
    symbols: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    species: str = "human"
    source: str = ""

    def __post_init__(self) -> None:
        g = len(self.ensembl_ids)
        object.__setattr__(self, "ensembl_ids", tuple(self.ensembl_ids))
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int32))
        object.__setattr__(self, "medians", np.asarray(self.medians, dtype=np.float64))
        object.__setattr__(self, "symbols", tuple(self.symbols) or ("",) * g)
        object.__setattr__(self, "aliases", dict(self.aliases))
        lengths = {"ensembl_ids": g, "token_ids": len(self.token_ids), "medians": len(self.medians), "symbols": len(self.symbols)}
        if len(set(lengths.values())) > 1:
            msg = f"A gene table needs columns of one length, got {lengths}."
            raise ValueError(msg)
        for name, values in (("Ensembl ids", self.ensembl_ids), ("token ids", self.token_ids.tolist())):
            if len(set(values)) != g:
                seen: set[Any] = set()
                twice = [v for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]
                msg = f"A gene table needs distinct {name}; {len(twice)} repeat: {some_of(map(str, twice))}."
                raise ValueError(msg)
        if g == 0:
            msg = "A gene table needs at least one gene."
            raise ValueError(msg)
        astray = [old for old, new in self.aliases.items() if new not in self.row_of]
        if astray:
            msg = f"{len(astray)} aliases lead to genes that are not in the table: {some_of(astray)}. Leave them out."
            raise ValueError(msg)
        bad = ~(np.isfinite(self.medians) & (self.medians > 0))
        if bad.any():
            names = [self.ensembl_ids[i] for i in np.flatnonzero(bad).tolist()]
            msg = f"{len(names)} of {g} medians are not positive numbers: {some_of(names)}. Leave these genes out."
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.ensembl_ids)

    def __repr__(self) -> str:
        return f"GeneTable({len(self):,} {self.species} genes, {len(self.aliases):,} aliases, source={self.source!r})"

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Ensembl id to row of the table."""
        return {name: row for row, name in enumerate(self.ensembl_ids)}

    @cached_property
    def _rows_of_symbol(self) -> dict[str, tuple[int, ...]]:
        rows: dict[str, tuple[int, ...]] = {}
        for row, symbol in enumerate(self.symbols):
            if symbol:
                rows[symbol] = (*rows.get(symbol, ()), row)
        return rows

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change whenever an encoding could: ids, token ids, medians, symbols, aliases."""
        digest = hashlib.sha256()
        for part in (list(self.ensembl_ids), self.token_ids.tolist(), self.medians.tolist(), list(self.symbols), sorted(self.aliases.items()), self.species):
            digest.update(json.dumps(part).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _ensembl_of_token(self) -> dict[int, str]:
        return dict(zip(self.token_ids.tolist(), self.ensembl_ids, strict=True))

    def ensembl_of_tokens(self, token_ids: Iterable[int]) -> list[str | None]:
        """Return the Ensembl id of each token; None for special tokens."""
        return [self._ensembl_of_token.get(int(token)) for token in token_ids]

    def token_of(self, names: Iterable[str]) -> np.ndarray:
        """Return the token ids of genes named by Ensembl id or symbol.

        Raises:
            UnknownGeneError: naming every gene that is not in the table or whose symbol is ambiguous.

        Example:
            >>> GeneTable(["ENSG00000141510"], [7], [1.0], ["TP53"]).token_of(["TP53", "ENSG00000141510.18"])
            array([7, 7], dtype=int32)
        """
        names = [str(name) for name in names]
        rows = [self._find(name)[0] for name in names]
        missing = [name for name, row in zip(names, rows, strict=True) if row is None]
        if missing:
            msg = (
                f"{len(missing)} of {len(names)} genes are not in this vocabulary of {len(self):,} {self.species} genes "
                f"(or their symbol is ambiguous): {some_of(missing, most=10)}. Check the spelling, or use Ensembl ids."
            )
            raise UnknownGeneError(msg)
        return self.token_ids[np.array(rows, dtype=np.int64)]

    def known_tokens(self, names: Iterable[str]) -> tuple[np.ndarray, list[str]]:
        """Return the token ids of those genes that are in the table, each once and sorted, and the names of the others.

        Example:
            >>> GeneTable(["ENSG00000141510"], [7], [1.0], ["TP53"]).known_tokens(["TP53", "no gene"])
            (array([7], dtype=int32), ['no gene'])
        """
        names = list(dict.fromkeys(map(str, names)))
        rows = [self._find(name)[0] for name in names]
        known = np.unique(self.token_ids[np.array([row for row in rows if row is not None], dtype=np.int64)])
        return known, [name for name, row in zip(names, rows, strict=True) if row is None]

    def _find(self, name: str) -> tuple[int | None, str]:
        """Return the row of one name and how it was found: id, version, retired, symbol, ambiguous or unknown."""
        if (row := self.row_of.get(name)) is not None:
            return row, "id"
        if match := ENSEMBL.fullmatch(name):
            return self._find_ensembl(match)
        rows = self._rows_of_symbol.get(name, ())
        if not rows and self.species == "human":
            rows = tuple(self.row_of[i] for i in human_genes().ids_of_symbol.get(name, ()) if i in self.row_of)
        if len(rows) == 1:
            return rows[0], "symbol"
        if rows:
            return None, "ambiguous"
        # Published mappings spell symbols in capitals (C1ORF112); mouse symbols (Actb) must not turn human that way.
        alias = self.aliases.get(name.replace("orf", "ORF"))
        if alias is not None:
            return self.row_of[alias], "alias symbol"
        dotted = self._rows_of_dotted.get(name, ())
        return (dotted[0], "dotted symbol") if len(dotted) == 1 else (None, "ambiguous" if dotted else "unknown")

    @cached_property
    def _rows_of_dotted(self) -> dict[str, tuple[int, ...]]:
        """Rows of the symbols that hold a dash, by what R makes of them: HLA.A of HLA-A."""
        rows: dict[str, set[int]] = {}
        for symbol, found in self._rows_of_symbol.items():
            if "-" in symbol:
                rows.setdefault(symbol.replace("-", "."), set()).update(found)
        if self.species == "human":
            for symbol, ids in human_genes().ids_of_symbol.items():
                known = {self.row_of[i] for i in ids if i in self.row_of}
                if "-" in symbol and known:
                    rows.setdefault(symbol.replace("-", "."), set()).update(known)
        return {symbol: tuple(sorted(found)) for symbol, found in rows.items()}

    def knows(self, name: str) -> bool:
        """Return whether an Ensembl id or symbol leads to exactly one gene of this table."""
        return self._find(name)[0] is not None

    def match(self, features: GeneFeatures, *, where: str = "") -> GeneColumns:
        """Match the genes of a file, under the names that fit this table best; see `resolve`.

        Raises:
            GeneIdError
        """
        named = features.named(self.knows)
        return self.resolve(named.names, source=named.source, where=where, named=named)

    def _find_ensembl(self, match: re.Match[str]) -> tuple[int | None, str]:
        stripped = canonical(match)
        how = "version" if match["version"] or match["par"] else "id"
        if (row := self.row_of.get(stripped)) is not None:
            return row, how
        alias = self.aliases.get(stripped)
        if alias is not None:
            return self.row_of[alias], f"retired {how}"
        return None, "unknown"

    def resolve(self, names: Sequence[str], *, source: str, where: str = "", named: NamedGenes | None = None) -> GeneColumns:
        """Match the gene names of a matrix against this table.

        Duplicates, retired ids and symbols that lead to one gene share a slot, whose counts are to be summed.

        Args:
            names (`Sequence[str]` of length g): Ensembl ids (versions allowed) or symbols, per entry.
            source (`str`): which column the names come from; shown in the report.
            where (`str`, *optional*): the file, for error messages.
            named (`NamedGenes`, *optional*): how the names were found, for the report.

        Raises:
            GeneIdError: if fewer than 5 % of the names reach the vocabulary and they do not cover a quarter of it either; ids of
                another species are named as such.
        """
        slot_of_row: dict[int, int] = {}
        slots = np.full(len(names), -1, dtype=np.int32)
        tally: dict[str, int] = {}
        ambiguous: list[str] = []
        unknown: list[str] = []
        for column, raw in enumerate(names):
            name = str(raw).strip()
            row, how = self._find(name)
            if row is None:
                (ambiguous if how == "ambiguous" else unknown).append(name)
                continue
            for word in how.split():
                tally[word] = tally.get(word, 0) + 1
            slots[column] = slot_of_row.setdefault(row, len(slot_of_row))
        rows = np.fromiter(slot_of_row, dtype=np.int64, count=len(slot_of_row))
        report = GeneReport(
            source=source,
            n_genes=len(names),
            n_mapped=int((slots >= 0).sum()),
            n_tokens=len(rows),
            n_retired=tally.get("retired", 0) + tally.get("alias", 0),
            n_versioned=tally.get("version", 0),
            n_symbols=tally.get("symbol", 0),
            ambiguous=tuple(ambiguous),
            unknown=tuple(unknown),
            n_filled=named.n_filled if named else 0,
            n_inside=named.n_inside if named else 0,
            n_dotted=tally.get("dotted", 0),
            notes=named.notes if named else (),
            species_code=next(((match["species"] or "") for match in map(ENSEMBL.fullmatch, self.ensembl_ids[:1]) if match), ""),
        )
        self._require_overlap(report, where)
        return GeneColumns(slots, self.token_ids[rows], self.medians[rows], report)

    def _require_overlap(self, report: GeneReport, where: str) -> None:
        prefix = f"{where}: " if where else ""
        if report.n_mapped >= max(1, MIN_OVERLAP * report.n_genes) or report.n_tokens >= max(1, MIN_COVERAGE * len(self)):
            return
        found = f"{report.n_mapped:,} of {report.n_genes:,} genes ({report.source}) are in this vocabulary of {len(self):,} {self.species} genes"
        species = species_of(report.unknown)
        if species is not None and species != self.species:
            msg = (
                f"{prefix}only {found}: these are {species} Ensembl ids ({some_of(report.unknown)}). "
                f"Map them to {self.species} orthologues first, or use a model trained on {species} cells."
            )
        elif 2 * sum(_NUMBERED.fullmatch(name) is not None for name in report.unknown) > len(report.unknown):
            msg = f"{prefix}only {found}: the names are numbered ({some_of(report.unknown)}), so the gene names seem to be lost. Give the column that holds them with `gene_ids=` (`--gene-ids`), or put Ensembl ids or symbols into the index of var."
        elif sum(name.capitalize() == name for name in report.unknown) > len(report.unknown) / 2 and species is None:
            msg = f"{prefix}only {found}: the names look like mouse or rat symbols ({some_of(report.unknown)}). Map them to {self.species} orthologues first."
        elif species is not None:
            msg = (
                f"{prefix}only {found}; expected at least {MIN_OVERLAP:.0%}. They are {species} Ensembl ids, but not those of this vocabulary "
                f"({some_of(report.unknown)}): a small panel, or a model whose vocabulary is another one."
            )
        else:
            msg = (
                f"{prefix}only {found}; expected at least {MIN_OVERLAP:.0%}. Not found: {some_of(report.unknown)}. "
                "Name the column of var that holds Ensembl ids or gene symbols with `gene_ids=` (`--gene-ids`)."
            )
        raise GeneIdError(msg)

    def to_json(self) -> str:
        """Return the table as JSON; numbers survive exactly."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "species": self.species,
            "source": self.source,
            "genes": {
                "ensembl_id": list(self.ensembl_ids),
                "token_id": self.token_ids.tolist(),
                "median": self.medians.tolist(),
                "symbol": list(self.symbols),
            },
            "aliases": self.aliases,
        }
        return json.dumps(content, indent=None, separators=(",", ":"), ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "gene table") -> GeneTable:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: if the text is not such a table, or a newer format.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT or not _is_whole(content["version"]) or not 1 <= content["version"] <= FORMAT_VERSION:
                msg = f"{where}: format {content['format']!r} version {content['version']}, expected {FORMAT!r} up to version {FORMAT_VERSION}. Update geneformer-hf."
                raise CheckpointError(msg)
            genes = content["genes"]
            for name, fits, expected in _COLUMNS:
                _require_values(genes[name], fits, f"{where}: genes.{name}", expected)
            if not isinstance(content["aliases"], dict):
                msg = f"{where}: aliases is {_short(content['aliases'])}; expected an object of retired ids or symbols and Ensembl ids. Make the table again with `geneformer-hf medians` or `convert`."
                raise CheckpointError(msg)
            _require_values([*content["aliases"].values()], _is_text, f"{where}: aliases", "texts")
            for name in ("species", "source"):
                if not _is_text(content[name]):
                    msg = f"{where}: {name} is {_short(content[name])}; expected a text. Make the table again with `geneformer-hf medians` or `convert`."
                    raise CheckpointError(msg)
            return cls(
                genes["ensembl_id"],
                genes["token_id"],
                genes["median"],
                genes["symbol"],
                content["aliases"],
                content["species"],
                content["source"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{where} is not a gene table ({type(error).__name__}: {error}). Make one with `geneformer-hf medians` or `geneformer-hf convert`."
            raise CheckpointError(msg) from error

    @classmethod
    def load(cls, path: str | Path) -> GeneTable:
        """Read a gene table from a JSON file."""
        return cls.from_json(read_text(Path(path), error=CheckpointError), where=str(path))

    @classmethod
    def from_medians(
        cls, medians: Mapping[str, float], *, first_token_id: int, symbols: Mapping[str, str] | None = None, species: str = "human", source: str = ""
    ) -> GeneTable:
        """Make the table of a new vocabulary: genes in sorted order of their Ensembl ids, as in the published ones.

        Args:
            medians: Ensembl id to median of its non-zero counts per 10,000.
            first_token_id (`int`): the number of special tokens, which come first.
        """
        ids = sorted(medians)
        names = symbols if symbols is not None else (human_genes().symbol_of if species == "human" else {})
        token_ids = range(first_token_id, first_token_id + len(ids))
        return cls(ids, token_ids, [medians[i] for i in ids], [names.get(i, "") for i in ids], {}, species, source)
