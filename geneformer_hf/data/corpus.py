"""Corpora: many files tokenized into one dataset, by one process, several or a Dask cluster, resumable.

The work falls into parts: row ranges of files. A part depends on the content of its file, the tokenizer and the options, and
its name says so; what is finished is not done again. Which process writes a part changes none of its bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from filelock import FileLock

from ..errors import CellFileError
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import PARTS, Unfinished, new_part, require_apart, unfinished
from .columns import ObsColumns, ObsHead
from .dataset_cards import dataset_card, without_folders
from .encoder import CellEncoder, EncodingOptions, features_of, row_ranges
from .files import content_hash, find_files
from .readers import open_cells
from .report import FileReport, SkippedFile, with_report
from .sources import FileSource, SourceOptions
from .tasks import FileTasks, Workers, open_workers
from .tokenized import report_of


@dataclass(frozen=True)
class FileSummary:
    """What has to be known of a file before its rows are dealt out."""

    path: str
    content: str
    """Hash of its bytes."""
    report: FileReport
    head: ObsHead
    holds_rows: bool
    totals_from: str | None


def tokenize_corpus(
    files: Any,
    output: str | Path,
    *,
    tokenizer: GeneformerTokenizer,
    obs: str | Sequence[str] = "all",
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    total_counts: str | None = None,
    keep_counts: bool = False,
    keep_uncropped: bool = False,
    num_proc: int | None = None,
    dask: str | None = None,
    skip_bad_files: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> datasets.Dataset:
    """Tokenize files of cells into a folder that opens with `datasets.load_from_disk`.

    As `load_cells`, for corpora: it can be stopped at any moment, even killed, and goes on where it stopped when called
    again with the same arguments; files that changed are done again. Every worker must see the files and the output under
    the same paths. The result is the same bytes whoever does the work.

    Args:
        files, tokenizer, obs, gene_ids, counts_layer, genome, total_counts, keep_counts, keep_uncropped: as in `load_cells`.
        output (`str` or `Path`): new folder.
        num_proc (`int`, *optional*): processes.
        dask (`str`, *optional*): address of a Dask scheduler, or `local` for a cluster of `num_proc` workers on this machine.
        skip_bad_files (`bool`, *optional*, defaults to `False`):
            Leave out files that cannot be used, whole, and say so, instead of stopping at the first.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output, once the new one is complete.

    Returns:
        `datasets.Dataset`, opened from the output; `info.description` is a JSON report of what was read and left out.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError, OutputExistsError, OutputError, WorkerDiedError
    """
    paths = find_files(files)
    require_apart(output, paths)
    wanted: Any = obs if obs in ("all", "none") else (obs,) if isinstance(obs, str) else tuple(obs)
    source, encoding = SourceOptions(gene_ids, counts_layer, total_counts, genome), EncodingOptions(wanted, keep_counts, keep_uncropped, genome is not None)
    with unfinished(output, overwrite=overwrite, made_by="tokenize") as work:
        tokenizer.save_pretrained(work.folder / f"tokenizer-{tokenizer.encoding_fingerprint}")
        try:
            with open_workers(num_proc, dask) as workers:
                return _tokenize(paths, work, workers, tokenizer, source, encoding, skip_bad_files=skip_bad_files, progress=progress)
        finally:
            # Workers of a cluster keep theirs; all are told apart by the hash of what they hold.
            for cache in (_tokenizer, _job, _encoder):
                cache.cache_clear()


def cached_corpus(paths: Sequence[Path], cache_dir: str | Path | None, name: str, *, tokenizer: GeneformerTokenizer, **options: Any) -> datasets.Dataset:
    """Return the corpus of this name in the cache of datasets, tokenized first if it is not there.

    Processes that ask for the same one at the same time wait for the first.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "geneformer_hf" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            return tokenize_corpus(paths, folder, tokenizer=tokenizer, **options)
    source = {key: options[key] for key in ("gene_ids", "counts_layer", "total_counts", "genome")}
    files = [FileReport.of(open_cells(path, **source), tokenizer.gene_table) for path in paths]
    return with_report(datasets.load_from_disk(str(folder)), files, tokenizer)


def _tokenize(
    paths: Sequence[Path],
    work: Unfinished,
    workers: Workers,
    tokenizer: GeneformerTokenizer,
    source: SourceOptions,
    encoding: EncodingOptions,
    *,
    skip_bad_files: bool,
    progress: bool,
) -> datasets.Dataset:
    folder, names = str(work.folder), [str(p) for p in paths]
    files = FileTasks(workers, skip_bad_files=skip_bad_files, progress=progress)
    described: list[FileSummary] = files.run(
        describe_file, [(folder, tokenizer.encoding_fingerprint, str(p.absolute()), str(p), source, encoding) for p in paths], names, "Files", "files"
    )
    files.require_some(len(paths))
    columns = ObsColumns.of([s.head for s in described], encoding.obs)
    job = write_job(work, described, columns, tokenizer, source, encoding)
    names = [s.report.file for s in described]
    parts = {s.report.file: _parts_of(s, columns, tokenizer, source, encoding) for s in described}
    files.parts_of = {name: [work.parts / part for *_, part in ranges] for name, ranges in parts.items()}
    missing = {part: (n, start, stop, part) for n, name in enumerate(names) for start, stop, part in parts[name] if not (work.parts / part).exists()}

    to_turn = sorted({n for n, *_ in missing.values() if not described[n].holds_rows})
    files.run(write_rows, [(folder, job, n) for n in to_turn], [names[n] for n in to_turn], "Turning files", "files")
    tasks = [task for task in missing.values() if names[task[0]] not in files.skipped]
    files.run(
        write_part,
        [(folder, job, *task) for task in tasks],
        [names[n] for n, *_ in tasks],
        "Tokenizing",
        "parts",
        n_done=sum(map(len, parts.values())) - len(tasks),
    )
    # A copy of a bad file shares its parts, which were tried once. Which of several bad files was met first is chance.
    bad = {s.content: files.skipped[s.report.file] for s in described if s.report.file in files.skipped}
    files.skipped |= {s.report.file: bad[s.content] for s in described if s.content in bad and s.report.file not in files.skipped}
    files.require_some(len(paths))
    kept = [s for s in described if s.report.file not in files.skipped]
    whole = work.folder / "dataset"
    try:
        _assemble(
            work, whole, [part for s in kept for *_, part in parts[s.report.file]], features_of(tokenizer, columns, encoding), tokenizer,
            [s.report for s in kept], [SkippedFile(str(p), str(files.skipped[str(p)])) for p in paths if str(p) in files.skipped],
        )  # fmt: skip
    except CellFileError:
        # No cell is left, and the same files would give the same.
        shutil.rmtree(work.parts)
        raise
    work.put_in_place(whole)
    return datasets.load_from_disk(str(work.output))


def describe_file(folder: str, fingerprint: str, path: str, name: str, options: SourceOptions, encoding: EncodingOptions) -> FileSummary:
    """Look at a file without reading its counts (but for a sample, and where totals are asked for)."""
    tokenizer = _tokenizer(folder, fingerprint)
    source = open_cells(path, **vars(options))
    head = ObsHead(name, ObsHead.of(source).first_row)
    # A column that is not there, genes that match nothing, a filter that is none: refused here, before any work.
    ObsColumns.of([head], encoding.obs)
    report = FileReport.of(source, tokenizer.gene_table, name=name)
    totals_from = source.totals_from if encoding.keep_counts else None
    return FileSummary(path, content_hash(path), report, head, not isinstance(source, FileSource) or source.holds_rows, totals_from)


def write_job(
    work: Unfinished, summaries: Sequence[FileSummary], columns: ObsColumns, tokenizer: GeneformerTokenizer, source: SourceOptions, encoding: EncodingOptions
) -> str:
    """Write what the workers need to know, and return its hash."""
    content = {
        "files": [{"path": s.path, "content": s.content, "totals_from": s.totals_from} for s in summaries],
        "tokenizer": tokenizer.encoding_fingerprint,
        "names": columns.names,
        "features": datasets.Features(columns.features).to_dict(),
        "source": asdict(source),
        "encoding": asdict(encoding),
    }
    text = json.dumps(content)
    job = xxhash.xxh3_128(text.encode()).hexdigest()
    with new_part(work.folder / f"job-{job}.json") as partial:
        partial.write_text(text, encoding="utf-8")
    return job


def _parts_of(
    summary: FileSummary, columns: ObsColumns, tokenizer: GeneformerTokenizer, source: SourceOptions, encoding: EncodingOptions
) -> list[tuple[int, int, str]]:
    """Return the row ranges of a file and the names of their parts."""
    ranges = row_ranges(summary.report.cells)
    # Nothing about other files, but for the classes they add: more of them change nothing about the parts of this one.
    about = f"{tokenizer.encoding_fingerprint} {summary.content} {summary.totals_from} {columns} {source} {encoding}"
    return [(start, stop, xxhash.xxh3_128(f"{about} {start} {stop}".encode()).hexdigest() + ".arrow") for start, stop in ranges]


@lru_cache(maxsize=2)
def _tokenizer(folder: str, fingerprint: str) -> GeneformerTokenizer:
    return GeneformerTokenizer.from_pretrained(Path(folder) / f"tokenizer-{fingerprint}")


@lru_cache(maxsize=2)
def _job(folder: str, job: str) -> dict[str, Any]:
    return json.loads((Path(folder) / f"job-{job}.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=2)
def _encoder(folder: str, job: str, number: int) -> CellEncoder:
    content = _job(folder, job)
    file = content["files"][number]
    source = open_cells(file["path"], **content["source"])
    source.totals_from = file["totals_from"]
    if isinstance(source, FileSource) and not source.holds_rows:
        source.use_rows(_rows_folder(folder, file["content"]))
    encoding = content["encoding"]
    obs: Any = encoding["obs"] if isinstance(encoding["obs"], str) else tuple(encoding["obs"])
    options = EncodingOptions(obs, encoding["keep_counts"], encoding["keep_uncropped"], encoding["genome_fraction"])
    columns = ObsColumns(content["names"], dict(datasets.Features.from_dict(content["features"])))
    return CellEncoder(source, _tokenizer(folder, content["tokenizer"]), columns, options)


def _rows_folder(folder: str, content: str) -> Path:
    return Path(folder) / f"rows-{content}"


def write_rows(folder: str, job: str, number: int) -> None:
    """Write the rows of a file that holds none, once for all its parts."""
    content = _job(folder, job)
    file = content["files"][number]
    rows = _rows_folder(folder, file["content"])
    source = open_cells(file["path"], **content["source"])
    if isinstance(source, FileSource) and not rows.is_dir():
        source.write_rows(rows)


def write_part(folder: str, job: str, number: int, start: int, stop: int, name: str) -> None:
    """Write the tokens of a row range as an Arrow stream."""
    part = Path(folder) / PARTS / name
    if part.exists():
        return
    encoder = _encoder(folder, job, number)
    with new_part(part) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, encoder.schema) as writer:
        for table in encoder.tables(start, stop):
            writer.write_table(table)


def _assemble(
    work: Unfinished,
    whole: Path,
    parts: Sequence[str],
    features: datasets.Features,
    tokenizer: GeneformerTokenizer,
    files: Sequence[FileReport],
    skipped: Sequence[SkippedFile],
) -> None:
    """Make a dataset folder of the parts."""
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        try:
            os.link(work.parts / part, whole / name)
        except OSError:
            # Some file systems have no links.
            shutil.copyfile(work.parts / part, whole / name)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": xxhash.xxh3_64(" ".join(parts).encode()).hexdigest(),
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": "train",
    }  # fmt: skip
    (whole / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    datasets.DatasetInfo(features=features).write_to_directory(str(whole))
    dataset = with_report(datasets.load_from_disk(str(whole)), files, tokenizer, skipped)
    dataset.info.write_to_directory(str(whole))
    # What the dataset is, for whoever it is passed on to; not by the name of its folder, which may change.
    text = dataset_card({"train": dataset}, without_folders(report_of(dataset)), name="Tokenized cells")
    (whole / "README.md").write_text(text, encoding="utf-8")
