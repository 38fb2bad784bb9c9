"""Labels of cells and genes as numbers: class ids in sorted order, several labels at once, measurements, tables of genes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import CellFileError, ColumnNotFoundError, SettingError, UnknownGeneError
from ..genes import GeneTable
from ..input_files import read_json
from ..models.heads import IGNORED
from ..pickles import read_dictionary
from .tables import read_text_table

SEPARATOR = ";"
GENE_COLUMNS = ("ensembl_id", "gene_id", "gene", "gene_name", "symbol")
CLASS_COLUMNS = ("class", "label", "gene_class", "cell_class")


def is_missing(value: Any) -> bool:
    """Return whether a value of obs says nothing: None, NaN or an empty text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip()) or value is pd.NA


def class_name(value: Any) -> str:
    """Return a label as text; whole numbers without a decimal point.

    Example:
        >>> class_name(2.0), class_name(True), class_name("B cell")
        ('2', 'True', 'B cell')
    """
    return str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)


def class_ids(values: Sequence[Any], names: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Return class names in sorted order, and the id of each value; -100 where it is missing.

    Args:
        values: labels, as text or numbers.
        names (*optional*): the classes, where they are known already; other labels get -100.

    Returns:
        names, and int64 of shape `(n,)`.

    Example:
        >>> class_ids(["T", "B", None, "T"])
        (['B', 'T'], array([   1,    0, -100,    1]))
    """
    texts = [None if is_missing(value) else class_name(value) for value in values]
    known = sorted({text for text in texts if text is not None}) if names is None else list(names)
    id_of = {name: number for number, name in enumerate(known)}
    return known, np.array([IGNORED if text is None else id_of.get(text, IGNORED) for text in texts], dtype=np.int64)


def label_matrix(columns: Mapping[str, Sequence[Any]]) -> tuple[list[str], np.ndarray]:
    """Return the names of labels that can hold together, and which hold for each cell; NaN where it is not known.

    Args:
        columns: several columns of 0 and 1 (or False and True), one a label; or one of texts that name labels, parted by ";", or of lists.

    Returns:
        names, and float32 of shape `(n, labels)`.

    Raises:
        SettingError: if one of several columns holds something else than 0 and 1.

    Example:
        >>> label_matrix({"markers": ["CD3;CD4", "CD19", None]})[0]
        ['CD19', 'CD3', 'CD4']
    """
    if len(columns) > 1:
        names, held = list(columns), []
        for name, values in columns.items():
            numbers = [math.nan if is_missing(v) else _as_flag(v, name) for v in values]
            held.append(np.array(numbers, dtype=np.float32))
        return names, np.stack(held, axis=1)
    ((name, values),) = columns.items()
    if any(isinstance(v, (bool, int, float, np.number)) and not is_missing(v) for v in values):
        return [name], np.array([[math.nan if is_missing(v) else _as_flag(v, name)] for v in values], dtype=np.float32)
    sets = [None if is_missing(v) else {class_name(part).strip() for part in (v.split(SEPARATOR) if isinstance(v, str) else v)} - {""} for v in values]
    names = sorted(set().union(*(s for s in sets if s is not None)))
    return names, np.array([[math.nan] * len(names) if s is None else [float(name in s) for name in names] for s in sets], dtype=np.float32)


def _as_flag(value: Any, name: str) -> float:
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true", "yes"):
        return 1.0
    if text in ("0", "0.0", "false", "no"):
        return 0.0
    msg = f"column {name!r} holds {value!r}; expected 0 and 1, or False and True, in each column of a multi_label_classification."
    raise SettingError(msg)


def numbers_of(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Return measurements, float32 of shape `(n, columns)`; NaN where one is missing.

    Raises:
        SettingError: if a value is no finite number.
    """
    out = []
    for name, values in columns.items():
        found = pd.to_numeric(pd.Series([None if is_missing(v) else v for v in values], dtype=object), errors="coerce").to_numpy(dtype=np.float32)
        broken = [v for v, number in zip(values, found, strict=True) if not is_missing(v) and not math.isfinite(number)]
        if broken:
            msg = (
                f"column {name!r} holds {broken[0]!r} ({len(broken):,} of {len(values):,} values are no finite numbers); problem_type regression needs numbers."
            )
            raise SettingError(msg)
        out.append(found)
    return np.stack(out, axis=1)


def class_counts(ids_n: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Return how many items each class has, missing ones left out."""
    counts = np.bincount(ids_n[ids_n != IGNORED], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def balanced_weights(ids_n: np.ndarray, n_classes: int) -> list[float]:
    """Return a weight for each class, so that all weigh alike and the mean over items is 1."""
    counts = np.bincount(ids_n[ids_n != IGNORED], minlength=n_classes)
    # A class that nobody is taught has the usual weight: it would have the largest of all.
    return np.where(counts > 0, counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)), 1.0).tolist()


@dataclass(frozen=True)
class GeneClasses:
    """Genes of a vocabulary with their classes."""

    names: list[str]
    """Classes, sorted."""
    token_ids: np.ndarray
    """int64 of shape `(g,)`."""
    class_ids: np.ndarray
    """int64 of shape `(g,)`."""
    unknown: list[str]
    """Genes of the table that the vocabulary does not have."""

    def of_tokens(self, vocab_size: int, chosen: np.ndarray | None = None) -> np.ndarray:
        """Return the class of every token id, int64; -100 for those without one, and for genes that are not chosen."""
        out = np.full(vocab_size, IGNORED, dtype=np.int64)
        rows = np.arange(len(self.token_ids)) if chosen is None else chosen
        out[self.token_ids[rows]] = self.class_ids[rows]
        return out


def match_gene_classes(classes: Mapping[str, Sequence[str]], table: GeneTable, *, where: str = "gene_classes") -> GeneClasses:
    """Find genes with classes in a vocabulary.

    Args:
        classes: class to genes, as Ensembl ids or symbols.

    Raises:
        SettingError: if a gene has two classes, or there are fewer than two classes.
        UnknownGeneError: if the vocabulary has none of the genes of a class.
    """
    names = sorted(str(name) for name in classes)
    if len(names) < 2:
        msg = f"{where}: {len(names)} class ({', '.join(names) or 'none'}); expected at least two, each with its genes."
        raise SettingError(msg)
    given = {str(name): genes for name, genes in classes.items()}
    class_of: dict[int, tuple[int, str]] = {}
    unknown, contradictory = [], []
    for number, name in enumerate(names):
        found = 0
        for gene in dict.fromkeys(map(str, given[name])):
            try:
                token = int(table.token_of([gene])[0])
            except UnknownGeneError:
                unknown.append(gene)
                continue
            found += 1
            other = class_of.setdefault(token, (number, gene))
            if other[0] != number:
                contradictory.append(f"{gene} ({names[other[0]]} and {name})")
        if not found:
            msg = f"{where}: the vocabulary has none of the {len(given[name]):,} genes of class {name!r} (such as {', '.join(map(str, list(given[name])[:3]))}). Expected Ensembl ids or symbols."
            raise UnknownGeneError(msg)
    if contradictory:
        msg = f"{where}: {len(contradictory):,} genes have two classes: {', '.join(contradictory[:5])}. Give each gene one."
        raise SettingError(msg)
    tokens = np.array(sorted(class_of), dtype=np.int64)
    return GeneClasses(names, tokens, np.array([class_of[token][0] for token in tokens.tolist()], dtype=np.int64), unknown)


def read_gene_classes(path: str | Path) -> dict[str, list[str]]:
    """Read a table of genes and classes: JSON of class to genes, a published pickle of the same, or a .csv or .tsv with a column of genes and one of classes.

    Raises:
        CellFileError, ColumnNotFoundError, UnsafePickleError, CheckpointError
    """
    path = Path(path)
    if path.suffix in (".pickle", ".pkl"):
        return _published_classes(path)
    try:
        if path.suffix == ".json":
            found = read_json(path)
            if not isinstance(found, dict) or not all(isinstance(genes, list) for genes in found.values()):
                msg = f"{path} holds a {type(found).__name__}; expected {{class: [genes, …], …}}."
                raise CellFileError(msg)
            return {str(name): [str(gene) for gene in genes] for name, genes in found.items()}
        frame = read_text_table(path)
    except (OSError, ValueError) as error:
        if isinstance(error, CellFileError):
            raise
        msg = f"{path} cannot be read as a table of genes and classes: {error}."
        raise CellFileError(msg) from error
    lowered = {str(column).lower(): column for column in frame.columns}
    gene = next((lowered[name] for name in GENE_COLUMNS if name in lowered), frame.columns[0])
    rest = [column for column in frame.columns if column != gene]
    kind = next((lowered[name] for name in CLASS_COLUMNS if name in lowered), rest[0] if len(rest) == 1 else None)
    if kind is None:
        msg = f"{path} has the columns {', '.join(map(str, frame.columns))}; expected one of genes ({', '.join(GENE_COLUMNS)}) and one of classes ({', '.join(CLASS_COLUMNS)})."
        raise ColumnNotFoundError(msg)
    incomplete = int(frame[[gene, kind]].isna().any(axis=1).sum())
    if incomplete:
        msg = f"{path}: {incomplete:,} of {len(frame):,} rows lack a gene ({gene}) or a class ({kind}). Complete or remove them."
        raise CellFileError(msg)
    return {str(name): group[gene].tolist() for name, group in frame.groupby(kind)}


def _published_classes(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        msg = f"{path} does not exist; expected a table of genes and classes."
        raise CellFileError(msg)
    found = read_dictionary(path)
    if not all(isinstance(genes, (list, tuple)) and all(isinstance(gene, str) for gene in genes) for genes in found.values()):
        msg = f"{path} holds a dictionary of other things than lists of genes; expected {{class: [Ensembl ids, …], …}}."
        raise CellFileError(msg)
    return {name: list(genes) for name, genes in found.items()}


def describe_counts(counts: Mapping[str, int], most: int = 12) -> str:
    """Return counts for people, the largest first."""
    ordered = Counter(dict(counts)).most_common()
    shown = ", ".join(f"{name} {n:,}" for name, n in ordered[:most])
    return shown + (f", and {len(ordered) - most} more" if len(ordered) > most else "")
