"""Quality of cells: which of them pass, and why the others do not. Nothing is dropped here.

A first pass measures every cell; its ranges of rows are tasks. The bounds of a dataset follow from the sums over its cells, and
with them the verdict on each.

Source of the rules: Theodoris et al. 2023, Methods, "Genecorpus-30M" (doi:10.1038/s41586-023-06139-9).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import xxhash

from ..errors import CellFileError, ColumnNotFoundError, SettingError
from ..gene_ids import canonical_id, human_genes, species_of
from ..outputs import Unfinished, new_part
from ..ranking import sum_columns
from .doublets import FEWEST_CELLS, doublet_scores, require_sample_size, require_scrublet
from .encoder import row_ranges
from .files import content_hash, find_files
from .readers import FileSource, SourceOptions, open_cells
from .sources import CellSource, sums_of
from .tasks import FileTasks, open_workers

logger = logging.getLogger(__name__)

CODING = ("protein_coding", "miRNA")
COLUMNS = ("filter_pass", "filter_reason", "qc_total_counts", "qc_mitochondrial_share", "qc_coding_genes", "qc_doublet_score")
"""What is said of each cell."""


@dataclass(frozen=True)
class QualityRules:
    """Which cells pass."""

    n_sd: float = 3.0
    """Standard deviations around the mean of the dataset that total counts and mitochondrial share may be away."""
    min_genes: int = 7
    """Detected protein-coding or miRNA genes a cell needs."""
    exclude: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns of obs that mark cells to leave out, and the values that do; without values whatever means yes."""
    dataset: str | None = None
    """Column of obs that names the dataset of a cell; otherwise a file is one."""
    sample: str | None = None
    """Column of obs that names the sample, within which doublets form; otherwise the dataset of a file."""
    doublets: bool = True
    """Whether to score doublets."""
    max_doublet_score: float | None = None
    """Highest score that passes; otherwise the valley that scrublet finds, and where it finds none, all pass."""

    def __post_init__(self) -> None:
        if self.max_doublet_score is not None and not self.doublets:
            msg = f"max_doublet_score is {self.max_doublet_score}, but doublets are not scored. Leave one of the two out."
            raise SettingError(msg)
        if not self.n_sd > 0 or self.min_genes < 0:
            msg = f"n_sd is {self.n_sd} and min_genes {self.min_genes}; expected a number above 0 and one of 0 or more."
            raise SettingError(msg)


ROUNDING = 1e-9
"""Cells that are all alike lie on their mean, which a sum over them gives to the last bit only by luck."""
REASONS = ("filter_pass was 0", "excluded", "few genes", "low counts", "high counts", "low mitochondrial share", "high mitochondrial share", "doublet")
YES = {"true", "1", "1.0", "yes", "malignant", "tumor", "tumour", "cancer", "neoplastic"}


@dataclass(frozen=True)
class MeasuredFile:
    """A file and where the measures of its cells are."""

    name: str
    path: str
    content: str
    n_cells: int
    holds_rows: bool
    totals_from: str | None
    has_mitochondrial: bool
    has_biotypes: bool
    genes: str = ""
    parts: tuple[str, ...] = ()
    scores: str | None = None


@dataclass
class Quality:
    """The verdict on every cell of some files.

    Args:
        summary (`DataFrame`): a row a dataset: cells, passing cells, cells by reason, mean, SD and bounds.
        genes (`dict[str, str]`): for each file, which of its features were read as genes, and by what name.
    """

    files: list[str]
    summary: pd.DataFrame
    genes: dict[str, str]
    _frames: dict[str, Path]

    def cells(self, file: str | None = None) -> pd.DataFrame:
        """Return the verdict on the cells of one file (of the only one by default), in order, indexed by cell id."""
        if file is None and len(self.files) != 1:
            msg = f"There are {len(self.files)} files; name one of them: {', '.join(self.files[:3])}, …"
            raise SettingError(msg)
        frame = pd.read_parquet(self._frames[file or self.files[0]])
        return frame.set_index("cell_id")[list(COLUMNS)]


def assess_quality(
    files: Any,
    *,
    rules: QualityRules | None = None,
    gene_biotypes: Mapping[str, str] | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    total_counts: str | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    dask: str | None = None,
    skip_bad_files: bool = False,
    work: Unfinished | None = None,
    progress: bool = False,
) -> Quality:
    """Decide which cells pass the quality filters of the published corpora; nothing is dropped.

    A cell passes if, within its dataset, its total counts and its share of mitochondrial counts lie within `n_sd` standard
    deviations of the mean (over the cells that pass the other rules but doublets), it has at least `min_genes` detected
    protein-coding or miRNA genes, no column named in `exclude` marks it, it is no doublet, and an existing `filter_pass` is 1.

    Args:
        files: as in `load_cells`: files of cells, a glob, a folder, or an AnnData.
        rules (`QualityRules`, *optional*): the bounds.
        gene_biotypes (`Mapping[str, str]`, *optional*):
            Ensembl id to biotype; the packaged table by default. For other species without it, all genes count as coding.
        gene_ids, counts_layer, genome, total_counts (`str`, *optional*): as in `load_cells`.
        seed (`int`, *optional*, defaults to 0): of the doublet scores.
        num_proc, dask, skip_bad_files, work: as in `fit_gene_table`.

    Returns:
        `Quality`: the verdict on each cell (`cells()`) and a summary of each dataset.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError, SettingError, MissingExtraError

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> genes = pd.DataFrame(index=["ENSG00000141510", "ENSG00000111640"])
        >>> cells = anndata.AnnData(np.array([[1, 9], [5, 5]]), pd.DataFrame(index=["a", "b"]), genes)
        >>> assess_quality(cells, rules=QualityRules(min_genes=3, doublets=False)).cells()["filter_reason"].tolist()
        ['few genes', 'few genes']
    """
    rules = rules or QualityRules()
    if rules.doublets:
        require_scrublet()
    options = SourceOptions(gene_ids, counts_layer, total_counts, genome)
    parts = work.parts if work is not None else Path(tempfile.mkdtemp(prefix="geneformer-hf-"))
    try:
        if hasattr(files, "obs") and hasattr(files, "var"):
            measured = [_measure_memory(open_cells(files, **vars(options)), parts, rules, gene_biotypes, seed)]
        else:
            measured = _measure_files(
                find_files(files), options, parts, rules, gene_biotypes, seed, num_proc, dask, skip_bad_files=skip_bad_files, progress=progress
            )
        quality = _judge(measured, parts, rules)
    except BaseException:
        if work is None:
            shutil.rmtree(parts, ignore_errors=True)
        raise
    finally:
        _opened.cache_clear()
    if work is None:
        weakref.finalize(quality, shutil.rmtree, parts, ignore_errors=True)
    return quality


def _measure_memory(source: CellSource, parts: Path, rules: QualityRules, gene_biotypes: Mapping[str, str] | None, seed: int) -> MeasuredFile:
    _require_columns(source, rules)
    genes = GeneKinds.of(source, gene_biotypes)
    _write_measures(source, genes, rules, 0, source.n_cells, parts / "0.parquet")
    file = MeasuredFile(
        source.name, source.name, "memory", source.n_cells, True, source.totals_from, genes.has_mitochondrial, genes.has_biotypes,
        source.describe_genes()[0], ("0.parquet",),
    )  # fmt: skip
    if not rules.doublets:
        return file
    file = _with_scores(file, rules, seed)
    _write_scores(source, rules, seed, parts / str(file.scores))
    return file


def _measure_files(
    paths: Sequence[Path], options: SourceOptions, parts: Path, rules: QualityRules, gene_biotypes: Mapping[str, str] | None, seed: int,
    num_proc: int | None, dask: str | None, *, skip_bad_files: bool, progress: bool,
) -> list[MeasuredFile]:  # fmt: skip
    with open_workers(num_proc, dask) as workers:
        tasks = FileTasks(workers, skip_bad_files=skip_bad_files, progress=progress)
        biotypes = tuple(sorted(gene_biotypes.items())) if gene_biotypes is not None else None
        names = [str(p) for p in paths]
        files: list[MeasuredFile] = tasks.run(describe_file, [(str(p.absolute()), str(p), options, rules, biotypes) for p in paths], names, "Files", "files")
        tasks.require_some(len(paths))
        files = [_with_parts(file, options, rules, biotypes, seed) for file in files]
        work = []
        for file in files:
            ranges = [(start, stop, part) for (start, stop), part in zip(row_ranges(file.n_cells), file.parts, strict=True)]
            # A file that holds no rows is turned once, not once a range.
            work += [(file, group) for group in ([[r] for r in ranges] if file.holds_rows else [ranges])]
        tasks.parts_of = {f.name: [parts / part for part in f.parts] for f in files}
        tasks.run(measure_ranges, [(f, options, rules, biotypes, str(parts), group) for f, group in work], [f.name for f, _ in work], "Measuring", "ranges")
        left = [f for f in files if f.name not in tasks.skipped]
        if rules.doublets:
            tasks.run(score_file, [(f, options, rules, seed, str(parts)) for f in left], [f.name for f in left], "Doublets", "files")
        tasks.require_some(len(paths))
    if tasks.skipped:
        logger.warning("%s files were skipped: %s", f"{len(tasks.skipped):,}", "; ".join(map(str, tasks.skipped.values())))
    return [f for f in left if f.name not in tasks.skipped]


def describe_file(path: str, name: str, options: SourceOptions, rules: QualityRules, gene_biotypes: tuple[tuple[str, str], ...] | None) -> MeasuredFile:
    """Look at a file; takes a pass over its counts where obs has a column of totals."""
    source = _open(path, name, options)
    _require_columns(source, rules)
    genes = GeneKinds.of(source, None if gene_biotypes is None else dict(gene_biotypes))
    holds_rows = not isinstance(source, FileSource) or source.holds_rows
    return MeasuredFile(
        name, path, content_hash(path), source.n_cells, holds_rows, source.totals_from, genes.has_mitochondrial, genes.has_biotypes, source.describe_genes()[0]
    )


def _with_parts(file: MeasuredFile, options: SourceOptions, rules: QualityRules, biotypes: tuple[tuple[str, str], ...] | None, seed: int) -> MeasuredFile:
    """Name the parts of a file, by what they depend on."""
    about = (
        f"{file.content} {options} {rules.exclude} {rules.dataset} {rules.sample} {file.totals_from} {biotypes} {file.name if rules.dataset is None else ''}"
    )
    parts = tuple(xxhash.xxh3_128(f"{about} {start} {stop}".encode()).hexdigest() + ".parquet" for start, stop in row_ranges(file.n_cells))
    file = MeasuredFile(**(vars(file) | {"parts": parts}))
    return _with_scores(file, rules, seed) if rules.doublets else file


def _open(path: str, name: str, options: SourceOptions) -> CellSource:
    source = open_cells(path, **vars(options))
    source.name = name
    return source


def _require_columns(source: CellSource, rules: QualityRules) -> None:
    wanted = [column for column, _ in rules.exclude] + [c for c in (rules.dataset, rules.sample) if c is not None]
    missing = [c for c in wanted if c not in source.obs_columns]
    if missing:
        msg = f"{source.name}: obs has no column {', '.join(map(repr, missing))}. Found: {', '.join(source.obs_columns) or 'none'}."
        raise ColumnNotFoundError(msg)


@dataclass(frozen=True)
class GeneKinds:
    """Which genes of a source are mitochondrial, and which count as detected genes."""

    mitochondrial_g: np.ndarray
    """bool of shape `(g,)`."""
    coding_slot_g: np.ndarray
    """int32 of shape `(g,)`: number of the coding gene, -1 for others."""
    has_biotypes: bool

    @property
    def has_mitochondrial(self) -> bool:
        """False where no gene is known to be mitochondrial, so that no share can be told."""
        return bool(self.mitochondrial_g.any())

    @classmethod
    def of(cls, source: CellSource, gene_biotypes: Mapping[str, str] | None) -> GeneKinds:
        """Look the genes up."""
        human = human_genes()
        ids = []
        for name in source.gene_names:
            found = human.ids_of_symbol.get(name.strip(), ())
            ids.append(canonical_id(name.strip()) or (found[0] if len(found) == 1 else ""))
        is_human = species_of(ids) in ("human", None)
        biotype_of = gene_biotypes if gene_biotypes is not None else human.biotype_of if is_human else None
        if biotype_of is not None and not any(i in biotype_of for i in ids):
            if gene_biotypes is not None:
                msg = f"{source.name}: none of its {len(ids):,} genes ({', '.join(source.gene_names[:3])}, …) is among the {len(gene_biotypes):,} of the biotypes given ({', '.join(list(gene_biotypes)[:3])}, …). Use Ensembl ids of the same species, without versions."
                raise SettingError(msg)
            # A table that knows none of the genes says nothing about them.
            biotype_of = None
        names = [(human.symbol_of.get(i, "") if is_human else "", n, s) for i, n, s in zip(ids, source.gene_names, source.gene_symbols, strict=True)]
        mitochondrial = np.array([any(name.upper().startswith("MT-") for name in options) for options in names], dtype=bool)
        slots = np.full(len(ids), -1, dtype=np.int32)
        slot_of: dict[str, int] = {}
        for g, (i, name) in enumerate(zip(ids, source.gene_names, strict=True)):
            if biotype_of is None or biotype_of.get(i) in CODING:
                slots[g] = slot_of.setdefault(i or name, len(slot_of))
        return cls(mitochondrial, slots, biotype_of is not None)


def measure_ranges(
    file: MeasuredFile,
    options: SourceOptions,
    rules: QualityRules,
    gene_biotypes: tuple[tuple[str, str], ...] | None,
    parts: str,
    ranges: Sequence[tuple[int, int, str]],
) -> None:
    """Write the measures of row ranges that are not there yet."""
    missing = [r for r in ranges if not (Path(parts) / r[-1]).exists()]
    if not missing:
        return
    source, genes = _opened(file, options, gene_biotypes)
    for start, stop, name in missing:
        _write_measures(source, genes, rules, start, stop, Path(parts) / name)


@lru_cache(maxsize=2)
def _opened(file: MeasuredFile, options: SourceOptions, gene_biotypes: tuple[tuple[str, str], ...] | None) -> tuple[CellSource, GeneKinds]:
    """Open a file once for all its ranges."""
    source = _open(file.path, file.name, options)
    source.totals_from = file.totals_from
    return source, GeneKinds.of(source, None if gene_biotypes is None else dict(gene_biotypes))


def _write_measures(source: CellSource, genes: GeneKinds, rules: QualityRules, start: int, stop: int, part: Path) -> None:
    n = stop - start
    totals, mitochondrial, coding = np.zeros(n), np.full(n, np.nan), np.zeros(n, dtype=np.int32)
    n_slots = int(genes.coding_slot_g.max(initial=-1)) + 1
    for block in source.iter_blocks(start, stop):
        rows = slice(block.start - start, block.start - start + block.counts_ng.shape[0])
        sums = sums_of(block)
        totals[rows] = source.totals(block)
        if genes.has_mitochondrial:
            in_mitochondria = np.asarray(block.counts_ng @ genes.mitochondrial_g.astype(np.float64)).ravel()
            mitochondrial[rows] = np.divide(in_mitochondria, sums, out=np.zeros_like(sums), where=sums > 0)
        coding[rows] = np.diff(sum_columns(block.counts_ng, genes.coding_slot_g, n_slots).indptr)
    obs = source.read_obs([c for c in (rules.dataset, rules.sample) if c is not None], start, stop)
    frame = pd.DataFrame(
        {
            "cell_id": obs.index.to_numpy(dtype=object),
            "qc_total_counts": totals,
            "qc_mitochondrial_share": mitochondrial,
            "qc_coding_genes": coding,
            "passed_before": source.passing[start:stop] if source.passing is not None else np.ones(n, dtype=bool),
            "excluded": _excluded(source, rules, start, stop),
            "dataset": _text(obs[rules.dataset]) if rules.dataset is not None else np.full(n, source.name, dtype=object),
        }
    )
    with new_part(part) as partial:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)


def _text(values: pd.Series, missing: str = "nan") -> np.ndarray:
    """Return a column as text; missing values are a value of their own, and 1.0 is 1."""
    gone = values.isna().to_numpy()
    return np.array([missing if lost else label(v) for v, lost in zip(values.astype(object), gone, strict=True)], dtype=object)


def label(value: Any) -> str:
    """Return a value as people write it: 1.0, or "1.0", is 1."""
    text = str(value)
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdigit() else text


def _excluded(source: CellSource, rules: QualityRules, start: int, stop: int) -> np.ndarray:
    """Return the column that marks each cell to be left out, empty for the others; object of shape `(n,)`."""
    out = np.full(stop - start, "", dtype=object)
    for column, values in reversed(rules.exclude):
        found = source.read_obs([column], start, stop)[column]
        text = pd.Series(_text(found, missing=""))
        marked = text.isin([label(v) for v in values]) if values else text.str.lower().isin(YES)
        out[marked.to_numpy()] = column
    return out


def _with_scores(file: MeasuredFile, rules: QualityRules, seed: int) -> MeasuredFile:
    """Name the part with the doublet scores of a file."""
    about = f"doublets {file.content} {file.parts} {rules.sample} {rules.dataset} {seed}"
    return MeasuredFile(**(vars(file) | {"scores": xxhash.xxh3_128(about.encode()).hexdigest() + ".parquet"}))


def score_file(file: MeasuredFile, options: SourceOptions, rules: QualityRules, seed: int, parts: str) -> None:
    """Write the doublet scores of a file, sample by sample."""
    part = Path(parts) / str(file.scores)
    if not part.exists():
        _write_scores(_open(file.path, file.name, options), rules, seed, part)


def _write_scores(source: CellSource, rules: QualityRules, seed: int, part: Path) -> None:
    column = rules.sample or rules.dataset
    samples = np.full(source.n_cells, source.name, dtype=object) if column is None else _text(source.read_obs([column])[column])
    scores, thresholds = np.full(source.n_cells, np.nan, dtype=np.float32), np.full(source.n_cells, np.nan)
    for sample in pd.unique(samples):
        rows = np.flatnonzero(samples == sample)
        require_sample_size(source.name if column is None else f"{source.name}, {column} {sample!r}", len(rows))
        blocks = [_rows_within(block.counts_ng, block.start, rows) for block in source.iter_blocks(int(rows[0]), int(rows[-1]) + 1)]
        scores[rows], thresholds[rows] = doublet_scores(sp.vstack(blocks, format="csr"), seed=seed)
    with new_part(part) as partial:
        pq.write_table(pa.table({"qc_doublet_score": scores, "threshold": thresholds}), partial)


def _rows_within(counts: sp.csr_array, start: int, rows: np.ndarray) -> sp.csr_array:
    here = rows[(rows >= start) & (rows < start + counts.shape[0])] - start
    return counts if len(here) == counts.shape[0] else counts[here]


def _judge(files: Sequence[MeasuredFile], parts: Path, rules: QualityRules) -> Quality:
    bounds = _bounds(files, parts, rules)
    if not sum(file.n_cells for file in files):
        msg = f"{', '.join(file.name for file in files[:3])}: there are no cells to judge."
        raise CellFileError(msg)
    summary: dict[str, dict[str, Any]] = {name: {"cells": 0, "passing": 0} | dict.fromkeys(REASONS, 0) for name in bounds}
    frames: dict[str, Path] = {}
    marking: set[str] = set()
    for number, file in enumerate(files):
        if not file.has_mitochondrial:
            logger.warning("%s: no gene is known to be mitochondrial, so the mitochondrial share is not judged.", file.name)
        if not file.has_biotypes:
            logger.warning("%s: biotypes of its genes are not known, so every detected gene counts. Name them with --gene-biotypes.", file.name)
        frames[file.name] = parts / f".verdict-{number}.parquet"
        scores = pd.read_parquet(parts / file.scores) if file.scores else pd.DataFrame({"qc_doublet_score": np.full(file.n_cells, np.float32(np.nan))})
        n_without = int(scores["qc_doublet_score"].isna().sum())
        if rules.doublets and n_without:
            logger.warning(
                "%s: %s of %s cells have no doublet score: their samples have fewer than %s cells, or too few genes vary.",
                file.name,
                f"{n_without:,}",
                f"{file.n_cells:,}",
                FEWEST_CELLS,
            )
        writer: pq.ParquetWriter | None = None
        start = 0
        for part in file.parts:
            frame = pd.read_parquet(parts / part)
            reasons = _verdict(frame, scores.iloc[start : start + len(frame)], bounds, rules)
            start += len(frame)
            marking |= set(frame["excluded"].unique())
            for name, rows in frame.groupby("dataset", sort=False).indices.items():
                row = summary[str(name)]
                row["cells"] += len(rows)
                row["passing"] += int((~reasons.to_numpy()[rows].any(axis=1)).sum())
                for reason in REASONS:
                    row[reason] += int(reasons[reason].to_numpy()[rows].sum())
            table = pa.Table.from_pandas(frame[["cell_id", *(c for c in COLUMNS if c in frame)]], preserve_index=False)
            writer = writer or pq.ParquetWriter(frames[file.name], table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    for column, values in rules.exclude:
        if column not in marking:
            logger.warning(
                "No cell is marked by obs[%r]%s.",
                column,
                f" being {' or '.join(values)}" if values else " (true, 1, yes, malignant, tumor, cancer, neoplastic)",
            )
    table = pd.DataFrame.from_dict({name: row | bounds[name] for name, row in summary.items()}, orient="index")
    table.index.name = "dataset"
    return Quality([f.name for f in files], table, {f.name: f.genes for f in files}, frames)


def _bounds(files: Sequence[MeasuredFile], parts: Path, rules: QualityRules) -> dict[str, dict[str, float]]:
    """Return mean, SD and bounds of each dataset, over the cells that pass the rules that are about single cells."""
    moments: dict[str, np.ndarray] = {}
    for file in files:
        for part in file.parts:
            frame = pd.read_parquet(parts / part)
            eligible = frame["passed_before"] & (frame["excluded"] == "") & (frame["qc_coding_genes"] >= rules.min_genes)
            for name in frame["dataset"].unique():
                moments.setdefault(str(name), np.zeros((2, 3)))
            for name, rows in frame[eligible].groupby("dataset", sort=False):
                for i, column in enumerate(("qc_total_counts", "qc_mitochondrial_share")):
                    moments[str(name)][i] = _with_values(moments[str(name)][i], rows[column].dropna().to_numpy())
    out: dict[str, dict[str, float]] = {}
    for name, found in moments.items():
        out[name] = {}
        for (n, mean, squares), what in zip(found, ("total_counts", "mitochondrial_share"), strict=True):
            middle, sd = (mean, float(np.sqrt(squares / n))) if n else (np.nan, np.nan)
            out[name] |= {f"{what}_mean": middle, f"{what}_sd": sd, f"{what}_low": max(0.0, middle - rules.n_sd * sd), f"{what}_high": middle + rules.n_sd * sd}
    return out


def _with_values(moments: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return number, mean and sum of squared distances from it, with more values (Chan et al. 1979: no digits are lost)."""
    if not len(values):
        return moments
    n, mean, squares = moments
    other = values.mean()
    total, distance = n + len(values), other - mean
    return np.array([total, mean + distance * len(values) / total, squares + ((values - other) ** 2).sum() + distance**2 * n * len(values) / total])


def _verdict(frame: pd.DataFrame, scores: pd.DataFrame, bounds: Mapping[str, Mapping[str, float]], rules: QualityRules) -> pd.DataFrame:
    """Add the verdict to the measures of some cells; return which reason holds for which cell, bool of shape `(n, reasons)`."""
    bound = pd.DataFrame.from_dict(bounds, orient="index").reindex(frame["dataset"]).reset_index(drop=True)
    few = frame["qc_coding_genes"] < rules.min_genes
    frame["qc_doublet_score"] = scores["qc_doublet_score"].to_numpy()
    highest = rules.max_doublet_score if rules.max_doublet_score is not None else scores["threshold"].to_numpy() if "threshold" in scores else np.nan
    counts, share = frame["qc_total_counts"], frame["qc_mitochondrial_share"]
    # Comparisons with NaN, where something could not be told, are False.
    reasons = pd.DataFrame(
        {
            "filter_pass was 0": ~frame["passed_before"],
            "excluded": frame["excluded"] != "",
            "few genes": few,
            "low counts": ~few & (counts < bound["total_counts_low"] * (1 - np.sign(bound["total_counts_low"]) * ROUNDING)),
            "high counts": ~few & (counts > bound["total_counts_high"] * (1 + ROUNDING)),
            "low mitochondrial share": ~few & (share < bound["mitochondrial_share_low"] * (1 - np.sign(bound["mitochondrial_share_low"]) * ROUNDING)),
            "high mitochondrial share": ~few & (share > bound["mitochondrial_share_high"] * (1 + ROUNDING)),
            "doublet": frame["qc_doublet_score"] > highest,
        }
    )
    words = reasons.to_numpy()
    text = np.full(len(frame), "", dtype=object)
    for i in np.flatnonzero(words.any(axis=1)).tolist():
        found = [REASONS[j] if REASONS[j] != "excluded" else f"excluded by {frame['excluded'].iat[i]}" for j in np.flatnonzero(words[i])]
        text[i] = "; ".join(found)
    frame["filter_pass"], frame["filter_reason"] = text == "", text
    return reasons
