"""Checkpoints by datasets: one table that grows, a finished part at a time; a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import xxhash
import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .._version import __version__
from ..data.files import content_hash
from ..errors import OutputError, OutputExistsError, SettingError
from ..models.loading import fingerprint_of, load_model, tokenizer_of
from ..outputs import new_part
from ..ranking import ENCODING_VERSION
from ..reports.evaluation_plots import plot_table
from ..reports.figures import without_nan
from ..reports.html import Page, Section, Table, write_page
from .evaluation import evaluate_cells
from .evaluation_report import MEANING, SUMMING_UP
from .representations import MODEL, named_models

logger = logging.getLogger(__name__)

ROWS, TABLE, BASELINES = "rows", "benchmark.csv", "(baselines)"
SETTINGS = ("layer", "pooling", "n_folds", "seed", "dtype", "quantization")
"""What figures depend on beside models and cells."""


@dataclass(frozen=True)
class BenchmarkDataset:
    """Labelled cells of a benchmark."""

    path: str
    labels: str
    """Column of obs with cell types."""
    batch: str | None = None
    held_out: str | None = None
    """Column whose values are kept apart in label transfer; the batch otherwise."""
    name: str = ""
    """For people; the file's otherwise."""
    gene_ids: str | None = None
    counts_layer: str | None = None

    @property
    def shown(self) -> str:
        """The name."""
        return self.name or Path(self.path).stem

    @cached_property
    def content(self) -> str:
        """Hash of its bytes."""
        return content_hash(self.path)


def read_benchmark(path: str | Path) -> dict[str, Any]:
    """Read the settings of a benchmark from YAML: `models` (a list, or names to folders), `datasets` (a list of `path`, `labels`, …) and options.

    Raises:
        SettingError: if it is no such file, or a key is not known.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}."
        raise SettingError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{path} is not valid YAML: {' '.join(str(error).split())}"
        raise SettingError(msg) from error
    known = ("models", "datasets", *SETTINGS, "batch_size", "device")
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content.get("models"):
        msg = f"{path}: expected `models:` (a list, or names to folders) and `datasets:` (a list of path, labels, batch)."
        raise SettingError(msg)
    keys = [f.name for f in fields(BenchmarkDataset)]
    unknown = [str(key) for key in content if key not in known]
    unknown += [f"datasets.{key}" for entry in content["datasets"] if isinstance(entry, dict) for key in entry if key not in keys]
    incomplete = [entry for entry in content["datasets"] if not isinstance(entry, dict) or not {"path", "labels"} <= set(entry)]
    if unknown or incomplete:
        what = f"unknown {', '.join(unknown)}" if unknown else f"a dataset without path or labels ({incomplete[0]})"
        msg = f"{path}: {what}. Expected {', '.join(known)}; of a dataset {', '.join(keys)}."
        raise SettingError(msg)
    return content | {"datasets": [BenchmarkDataset(**entry) for entry in content["datasets"]]}


def benchmark(
    models: Any, datasets: Sequence[BenchmarkDataset | Mapping[str, Any]], output: str | Path, *, progress: bool = True, **options: Any
) -> pd.DataFrame:
    """Judge every model, an untrained one of its shape, and expression itself on every dataset, and keep the table in a folder.

    Each part (a model or the baselines, on a dataset) is kept when it is finished, under a name that says all it depends on: the same call goes on
    where it stopped, and a call with more models or datasets computes what is new. Cells are judged as in `evaluate_cells`, each part by itself: a cell
    without a gene of one vocabulary is left out of that model's figures (`cells_judged`).

    Args:
        models: as in `evaluate_cells`; folders or Hub ids.
        datasets: files of cells, with their columns.
        output (`str` or `Path`): folder of the table; made, or gone on with.
        options: layer, pooling, n_folds, seed, batch_size, device, dtype, quantization, as in `evaluate_cells`.

    Returns:
        `pd.DataFrame`, a row for each dataset and representation; also in `benchmark.csv`, with `benchmark.json` and `report.html` beside it.

    Raises:
        OutputExistsError: if the folder holds something else.
        OutputError: if another process is writing it.
        SettingError: for two datasets of one name; and as `evaluate_cells`, after what is finished was kept.
    """
    unknown = sorted(set(options) - {*SETTINGS, "batch_size", "device"})
    if unknown:
        msg = f"benchmark has no option {', '.join(unknown)}; it takes {', '.join((*SETTINGS, 'batch_size', 'device'))}."
        raise SettingError(msg)
    named, chosen = named_models(models), [one if isinstance(one, BenchmarkDataset) else BenchmarkDataset(**one) for one in datasets]
    names = [one.shown for one in chosen]
    if len(set(names)) < len(names) or not names:
        msg = f"datasets are called {', '.join(names) or 'nothing'}; expected one or more, each with a name of its own."
        raise SettingError(msg)
    with _table(Path(output)) as folder:
        identities = {name: _identity(model) for name, model in named.items()} | {BASELINES: ""}
        tasks = [(dataset, name) for dataset in chosen for name in identities]
        rows: list[dict[str, Any]] = []
        for dataset, name in tqdm(tasks, desc="Benchmark", unit=" parts", disable=not progress):
            part = folder / ROWS / f"{_key(dataset, identities[name], options)}.json"
            if not part.is_file():
                found = _judged(dataset, {} if name == BASELINES else {"model": named[name]}, options)
                with new_part(part) as partial:
                    partial.write_text(json.dumps(without_nan(found)), encoding="utf-8")
            rows += _named(json.loads(part.read_text(encoding="utf-8")), dataset, name)
        table = pd.DataFrame(_without_repeats(rows))
        _write(table, folder, {"models": {name: str(model) for name, model in named.items()}, "datasets": [asdict(one) for one in chosen]} | options)
    return table


@contextmanager
def _table(folder: Path) -> Iterator[Path]:
    """Yield the folder of a table, held by this process alone.

    Raises:
        OutputExistsError, OutputError
    """
    if folder.exists() and not (folder / ROWS).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} exists and is not the table of a benchmark. Choose another name."
        raise OutputExistsError(msg)
    try:
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"{folder} is being written by another process. Wait for it, or choose another output."
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write to {folder}: {error.strerror or error}. Choose another output."
        raise OutputError(msg) from error
    try:
        yield folder
    finally:
        lock.release()


def _identity(model: Any) -> str:
    opened = load_model(model)
    return f"{fingerprint_of(opened)} {type(opened).__name__} {tokenizer_of(opened).gene_table.fingerprint}"


def _key(dataset: BenchmarkDataset, model: str, options: Mapping[str, Any]) -> str:
    facts = asdict(dataset) | {"path": "", "name": "", "content": dataset.content, "model": model, "encoding": ENCODING_VERSION, "version": __version__}
    # Where it is computed, and how many cells at a time, changes nothing that is shown.
    facts |= {name: options[name] for name in SETTINGS if name in options}
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _judged(dataset: BenchmarkDataset, models: dict[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    logger.info("%s: %s", dataset.shown, ", ".join(models) or "baselines")
    found = evaluate_cells(
        models, dataset.path, labels=dataset.labels, batch=dataset.batch, held_out=dataset.held_out, gene_ids=dataset.gene_ids, counts_layer=dataset.counts_layer,
        baselines=not models, progress=False, **options,
    )  # fmt: skip
    facts = {"cells": len(found.used), "cells_judged": int(found.used.sum()), "notes": found.notes}
    return [one.row() | facts for one in found.judged]


def _named(rows: list[dict[str, Any]], dataset: BenchmarkDataset, name: str) -> list[dict[str, Any]]:
    """Give a part's rows the names of this call: a part does not know what a model is called."""
    shown = {"model": name, "untrained": f"untrained, shape of {name}"}
    return [{"dataset": dataset.shown} | row | {"name": shown.get(row["name"], row["name"])} for row in rows]


def _without_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out untrained models of a shape that stands there already: same figures of the same cells."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        facts = {key: value for key, value in row.items() if key not in ("name", "notes")} if row["kind"] == "untrained" else row
        kept.setdefault(json.dumps(facts, sort_keys=True), row)
    return list(kept.values())


def _write(table: pd.DataFrame, folder: Path, settings: Mapping[str, Any]) -> None:
    pictures, sections = [], []
    shown = [name for name in SUMMING_UP if name in table]
    drawn = folder / "pictures"
    drawn.mkdir(exist_ok=True)
    for figure in shown:
        wide = table.assign(row=table["name"].where(table["kind"] != "baseline", table["name"].str.replace(r"[\d,]+ variable", "variable", regex=True)))
        wide = wide.pivot_table(index="row", columns="dataset", values=figure, sort=False, observed=True)
        models = set(table.loc[table["kind"] == MODEL, "name"])
        order = [name for name in wide.index if name in models] + [name for name in wide.index if name not in models]
        pictures.append(drawn / f"{figure}.png")
        plot_table(
            wide.loc[order].to_numpy(dtype=float), order, list(wide.columns), pictures[-1], title=figure.replace("_", " "), what="figure", n_marked=len(models)
        )
    sections.append(Section("Figures", pictures=pictures, points=MEANING))
    for dataset, rows in table.groupby("dataset", sort=False):
        columns = ["name", *shown, "cells_judged"]
        notes = sorted({note for notes in rows["notes"] for note in notes})
        ordered = rows.sort_values("kind", key=lambda kinds: kinds != MODEL, kind="stable")[columns]
        sections.append(Section(str(dataset), tables=[Table(ordered.to_dict("records"), n_marked=int((rows["kind"] == MODEL).sum()))], points=notes))
    sections.append(Section("Settings", settings=yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, allow_unicode=True)))
    n = f"{table['dataset'].nunique()} datasets, {table['name'].nunique()} embeddings"
    for name, write in (
        (TABLE, lambda path: table.drop(columns="notes").to_csv(path, index=False)),
        (
            "benchmark.json",
            lambda path: path.write_text(json.dumps(without_nan({"settings": dict(settings), "rows": table.to_dict("records")}), indent=1), encoding="utf-8"),
        ),
        ("report.html", lambda path: write_page(Page("Benchmark", f"{n}; nothing was trained on these cells. geneformer-hf {__version__}.", sections), path)),
    ):
        with new_part(folder / name) as partial:
            write(partial)
