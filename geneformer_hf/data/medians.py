"""Gene medians over a corpus: what turns counts into a rank value encoding for a new vocabulary.

One pass. Row ranges of files become sketches, one a gene (`sketches.py`), which are merged some genes at a time; memory is that
of one range, whatever the corpus. A sketch depends on its range alone and they are merged in the order of the files, so who does
the work changes nothing.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import xxhash

from ..errors import GeneIdError, SettingError
from ..gene_ids import canonical_id, human_genes, species_of
from ..genes import GeneTable
from ..outputs import Unfinished
from ..ranking import TARGET_SUM, sum_columns
from .files import content_hash, find_files
from .readers import FileSource, SourceOptions, open_cells
from .sketches import COMPRESSION, MOST_EXACT, MedianSketch, add_saved, save_sketches
from .sources import CellBlock, CellSource
from .tasks import FileTasks, open_workers

logger = logging.getLogger(__name__)

N_SPECIAL_TOKENS = 4
RANGE_CELLS = 65_536
BUFFER_VALUES = 1 << 22
"""Values collected before they are dealt out to the sketches of their genes."""
MERGED_GENES = 4000
"""Genes whose sketches are merged at a time, up to 64 kB each."""


def fit_gene_table(
    files: Any,
    *,
    special_tokens: bool = True,
    biotypes: Sequence[str] | None = None,
    gene_biotypes: Mapping[str, str] | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    total_counts: str | None = None,
    num_proc: int | None = None,
    dask: str | None = None,
    skip_bad_files: bool = False,
    work: Unfinished | None = None,
    progress: bool = False,
) -> GeneTable:
    """Fit the gene table of a new vocabulary: the median of the non-zero counts per 10,000 of every detected gene.

    Cells whose `obs["filter_pass"]` is 0 are left out. Symbols are mapped to human Ensembl ids. Medians are exact for genes
    in up to 16,384 cells and within 0.1 % beyond (`data/sketches.py`). Finished parts take a tenth of the corpus on disk.

    Args:
        files: as in `load_cells`: files of cells, a glob, a folder, or an AnnData; of one species.
        special_tokens (`bool`, *optional*, defaults to `True`):
            Leave the first four token ids to `<pad>`, `<mask>`, `<cls>` and `<eos>` (V2); otherwise two (V1).
        biotypes (`Sequence[str]`, *optional*):
            Keep these only, in GENCODE's words; `["protein_coding", "miRNA"]` are those of the published vocabularies.
        gene_biotypes (`Mapping[str, str]`, *optional*):
            Ensembl id to biotype; the packaged table of human genes by default, so needed for other species.
        gene_ids, counts_layer, genome, total_counts (`str`, *optional*): as in `load_cells`.
        num_proc, dask, skip_bad_files: as in `tokenize_corpus`.
        work (`Unfinished`, *optional*): where finished parts are kept until the next call (`outputs.unfinished`).

    Returns:
        `GeneTable`: genes in the order of their Ensembl ids, with symbols where the species is human.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, SettingError, WorkerDiedError

    Source: Theodoris et al. 2023, Methods (non-zero median expression value of each gene, by t-digest), counts per 10,000.

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> genes = pd.DataFrame(index=["ENSG00000141510", "ENSG00000111640"])
        >>> cells = anndata.AnnData(np.array([[1, 9], [5, 5]]), pd.DataFrame(index=["a", "b"]), genes)
        >>> fit_gene_table(cells).medians
        array([7000., 3000.])
    """
    options = SourceOptions(gene_ids, counts_layer, total_counts, genome)
    with _parts_folder(work) as parts:
        if hasattr(files, "obs") and hasattr(files, "var"):
            sketched = [_sketch_memory(open_cells(files, **vars(options)), parts)]
        else:
            sketched = _sketch_files(find_files(files), options, parts, num_proc, dask, skip_bad_files=skip_bad_files, progress=progress)
        for file in sketched:
            logger.log(logging.INFO if file.genes_are_plain else logging.WARNING, "%s: %s.", file.name, file.genes)
        return _merge(sketched, parts, biotypes, gene_biotypes, special_tokens=special_tokens)


@dataclass(frozen=True)
class SketchedFile:
    """What is known of a file, and the names of its sketches."""

    name: str
    path: str
    content: str
    ensembl_ids: tuple[str, ...]
    """Genes, sorted; sketches refer to them by number."""
    n_cells: int
    n_passing: int
    holds_rows: bool
    totals_from: str | None
    genes: str
    genes_are_plain: bool
    parts: tuple[str, ...] = ()


@contextmanager
def _parts_folder(work: Unfinished | None) -> Iterator[Path]:
    if work is not None:
        yield work.parts
        return
    with tempfile.TemporaryDirectory(prefix="geneformer-hf-") as folder:
        yield Path(folder)


def _sketch_memory(source: CellSource, parts: Path) -> SketchedFile:
    ids = ensembl_ids_of(source)
    _require_genes([(source.name, ids)])
    # A pass over cells in memory costs nothing to speak of.
    file = _about(source, source.name, "memory", ids, source.totals_from)
    names = []
    for start, stop in _ranges(source.n_cells):
        _write_sketch(source, ids, start, stop, parts / f"{start}.npz")
        names.append(f"{start}.npz")
    return SketchedFile(**(vars(file) | {"parts": tuple(names)}))


def _about(source: CellSource, path: str, content: str, ids: tuple[str, ...], totals_from: str | None) -> SketchedFile:
    n_passing = source.n_cells if source.passing is None else int(source.passing.sum())
    holds_rows = not isinstance(source, FileSource) or source.holds_rows
    return SketchedFile(source.name, path, content, ids, source.n_cells, n_passing, holds_rows, totals_from, *source.describe_genes())


def _sketch_files(
    paths: Sequence[Path], options: SourceOptions, parts: Path, num_proc: int | None, dask: str | None, *, skip_bad_files: bool, progress: bool
) -> list[SketchedFile]:
    with open_workers(num_proc, dask) as workers:
        tasks = FileTasks(workers, skip_bad_files=skip_bad_files, progress=progress)
        files: list[SketchedFile] = tasks.run(describe_file, [(str(p.absolute()), str(p), options) for p in paths], [str(p) for p in paths], "Files", "files")
        tasks.require_some(len(paths))
        _require_genes([(f.name, f.ensembl_ids) for f in files])
        done = {f.name: f for f in _sketch(files, options, parts, tasks)}
        # Totals that turn out to be below the counts are found on the way, so that there is one pass where all is well.
        while wrong := [f for f in done.values() if not f.parts and f.n_cells and f.name not in tasks.skipped]:
            done |= {f.name: f for f in _sketch(wrong, options, parts, tasks)}
        tasks.require_some(len(paths))
    if tasks.skipped:
        logger.warning("%s files were skipped: %s", f"{len(tasks.skipped):,}", "; ".join(map(str, tasks.skipped.values())))
    return [done[f.name] for f in files if f.name in done and f.name not in tasks.skipped]


def _sketch(files: Sequence[SketchedFile], options: SourceOptions, parts: Path, tasks: FileTasks) -> list[SketchedFile]:
    """Make the sketches of files; one whose column of totals is wrong comes back without it and without sketches."""
    work = []
    for file in files:
        about = f"{file.content} {options} {file.totals_from} {file.ensembl_ids} {MOST_EXACT} {COMPRESSION}"
        names = tuple(xxhash.xxh3_128(f"{about} {start} {stop}".encode()).hexdigest() + ".npz" for start, stop in _ranges(file.n_cells))
        # A file that holds no rows is turned once, not once a range.
        ranges = [(start, stop, name) for (start, stop), name in zip(_ranges(file.n_cells), names, strict=True)]
        groups = [[r] for r in ranges] if file.holds_rows else [ranges]
        work += [(SketchedFile(**(vars(file) | {"parts": names})), group) for group in groups]
    tasks.parts_of |= {f.name: [parts / name for name in f.parts] for f, _ in work}
    owners = [f.name for f, _ in work]
    # Tens of thousands of gene names go to no worker; it finds them in the file.
    light = [(SketchedFile(**(vars(file) | {"ensembl_ids": (), "parts": ()})), group) for file, group in work]
    n_short = tasks.run(sketch_ranges, [(f, options, str(parts), group) for f, group in light], owners, "Sketching", "ranges")
    short: dict[str, int] = {}
    for name, n in zip([name for name in owners if name not in tasks.skipped], n_short, strict=True):
        short[name] = short.get(name, 0) + n
    out = []
    for file in {f.name: f for f, _ in work}.values():
        if n := short.get(file.name, 0):
            source = open_cells(file.path, **vars(options))
            source.name = file.name
            source.reject_totals(str(file.totals_from), n)
            left = source.totals_candidates
            following = left[left.index(str(file.totals_from)) + 1 :]
            out.append(SketchedFile(**(vars(file) | {"parts": (), "totals_from": following[0] if following else None})))
        else:
            out.append(file)
    return out


def describe_file(path: str, name: str, options: SourceOptions) -> SketchedFile:
    """Look at a file without reading its counts, but for a sample."""
    source = open_cells(path, **vars(options))
    source.name = name
    candidates = source.totals_candidates
    return _about(source, path, content_hash(path), ensembl_ids_of(source), candidates[0] if candidates else None)


def sketch_ranges(file: SketchedFile, options: SourceOptions, parts: str, ranges: Sequence[tuple[int, int, str]]) -> int:
    """Write the sketches of row ranges that are not there yet; return how many cells have totals below their counts."""
    source: CellSource | None = None
    n_short = 0
    for start, stop, name in ranges:
        part = Path(parts) / name
        if not part.exists():
            if source is None:
                source = open_cells(file.path, **vars(options))
                source.name, source.totals_from = file.name, file.totals_from
            n_short += _write_sketch(source, ensembl_ids_of(source), start, stop, part)
    return n_short


def _write_sketch(source: CellSource, ids: tuple[str, ...], start: int, stop: int, part: Path) -> int:
    """Write the sketch of a row range, unless totals are below counts; return how many."""
    columns = source.match_genes(_table_of(ids))
    gene_of_slot = columns.token_ids
    sketches: dict[int, MedianSketch] = {}
    genes: list[np.ndarray] = []
    values: list[np.ndarray] = []
    n_held = n_short = 0

    def deal() -> None:
        if not genes:
            return
        gene, value = np.concatenate(genes), np.concatenate(values)
        genes.clear()
        values.clear()
        order = np.argsort(gene, kind="stable")
        gene, value = gene[order], value[order]
        firsts = np.flatnonzero(np.diff(gene, prepend=-1))
        for first, last in zip(firsts, np.append(firsts[1:], len(gene)), strict=True):
            sketches.setdefault(int(gene[first]), MedianSketch()).add(value[first:last])

    for block in source.iter_blocks(start, stop):
        if source.totals_from is not None:
            n_short += source.short_of(source.totals_from, block)
        scaled = _per_ten_thousand(source, block, columns.slot_of_column, len(gene_of_slot))
        genes.append(gene_of_slot[scaled.indices])
        values.append(scaled.data)
        n_held += scaled.nnz
        if n_held >= BUFFER_VALUES:
            deal()
            n_held = 0
    deal()
    if n_short:
        return n_short
    save_sketches(sketches, part)
    return 0


def _per_ten_thousand(source: CellSource, block: CellBlock, slot_of_column: np.ndarray, n_slots: int) -> sp.csr_array:
    counts = sum_columns(block.counts_ng, slot_of_column, n_slots)
    scaled = sp.csr_array(sp.diags_array(TARGET_SUM / np.maximum(source.totals(block), 1)) @ counts)
    if source.passing is None:
        return scaled
    return scaled[source.passing[block.start : block.start + counts.shape[0]]]


def _merge(
    files: Sequence[SketchedFile], parts: Path, biotypes: Sequence[str] | None, gene_biotypes: Mapping[str, str] | None, *, special_tokens: bool
) -> GeneTable:
    ids = sorted({name for file in files for name in file.ensembl_ids})
    species = species_of(ids) or "human"
    if biotypes is not None:
        ids = _of_biotypes(ids, biotypes, gene_biotypes, species)
    medians: dict[str, float] = {}
    for first in range(0, len(ids), MERGED_GENES):
        chosen = ids[first : first + MERGED_GENES]
        sketches: dict[str, MedianSketch] = {name: MedianSketch() for name in chosen}
        for file in files:
            here = {number: sketches[name] for number, name in enumerate(file.ensembl_ids) if name in sketches}
            for part in file.parts:
                add_saved(parts / part, here)
        medians |= {name: sketch.median() for name, sketch in sketches.items() if not sketch.is_empty}
    if not medians:
        msg = f"No gene is detected in any cell of {', '.join(f.name for f in files[:3])}."
        raise GeneIdError(msg)
    n_cells = sum(f.n_passing for f in files)
    if n_filtered := sum(f.n_cells for f in files) - n_cells:
        logger.warning("%s cells were left out because obs['filter_pass'] is 0.", f"{n_filtered:,}")
    first_token_id = N_SPECIAL_TOKENS if special_tokens else 2
    return GeneTable.from_medians(medians, first_token_id=first_token_id, species=species, source=f"medians of {n_cells:,} cells")


def _of_biotypes(ids: Sequence[str], biotypes: Sequence[str], gene_biotypes: Mapping[str, str] | None, species: str) -> list[str]:
    if gene_biotypes is None and species != "human":
        msg = f"The biotypes of {species} genes are not packaged. Pass them as `gene_biotypes=` (`--gene-biotypes FILE`), or leave `biotypes` out."
        raise SettingError(msg)
    known = gene_biotypes if gene_biotypes is not None else human_genes().biotype_of
    kept = [name for name in ids if known.get(name) in biotypes]
    there = sorted({known[name] for name in ids if name in known})
    if absent := [kind for kind in biotypes if kind not in there]:
        msg = f"No gene of the files is of the biotypes {', '.join(absent)}. Found: {', '.join(there[:20]) or 'none that is known'}."
        raise SettingError(msg)
    logger.warning("%s of %s genes are %s; the others are left out.", f"{len(kept):,}", f"{len(ids):,}", " or ".join(biotypes))
    return kept


def _require_genes(files: Sequence[tuple[str, Sequence[str]]]) -> None:
    kinds = {name: species_of(ids) for name, ids in files}
    if len(set(kinds.values()) - {None}) > 1:
        msg = f"The files are of several species: {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}. Fit one gene table per species."
        raise GeneIdError(msg)


def ensembl_ids_of(source: CellSource) -> tuple[str, ...]:
    """Return the Ensembl ids that the gene names of a source stand for, sorted; names that stand for none are left out.

    Raises:
        GeneIdError: if none of them does.
    """
    ids = set()
    for raw in source.gene_names:
        name = raw.strip()
        if (ensembl_id := canonical_id(name)) is not None:
            ids.add(ensembl_id)
        elif len(found := human_genes().ids_of_symbol.get(name, ())) == 1:
            ids |= set(found)
    if not ids:
        msg = f"{source.name}: none of its genes ({', '.join(source.gene_names[:3])}, …) is an Ensembl id or a human symbol. Name the column with `gene_ids=` (`--gene-ids`)."
        raise GeneIdError(msg)
    return tuple(sorted(ids))


def _table_of(ids: Sequence[str]) -> GeneTable:
    """Return a table whose token ids number the genes."""
    return GeneTable(ids, range(len(ids)), np.ones(len(ids)), species=species_of(ids) or "human")


def _ranges(n_cells: int) -> list[tuple[int, int]]:
    return [(start, min(start + RANGE_CELLS, n_cells)) for start in range(0, n_cells, RANGE_CELLS)]
