"""Checkpoints by datasets: one table that grows, a finished part at a time; a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
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
from ..input_files import load_yaml, read_text
from ..models.loading import fingerprint_of, load_model, tokenizer_of, untrained_encoder
from ..outputs import new_part
from ..ranking import ENCODING_VERSION
from ..reports.csv_files import write_csv
from ..reports.evaluation_plots import plot_table
from ..reports.figures import without_nan
from ..reports.html import Page, Section, Table, write_page
from .evaluation import evaluate_cells, require_numbers
from .evaluation_report import MEANING, SUMMING_UP
from .representations import BASELINE, MODEL, UNTRAINED, named_models, shape_of

ROWS, TABLE = "rows", "benchmark.csv"
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
    genome: str | None = None

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
        content = load_yaml(read_text(Path(path), error=SettingError), str(path), error=SettingError)
    except OSError as error:
        msg = f"{path} cannot be read: {error}."
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
    for key, value in [item for entry in content["datasets"] for item in entry.items()]:
        if not isinstance(value, str) and (value is not None or key in ("path", "labels")):
            msg = f"{path}: datasets.{key} is {value!r}; expected text."
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
    require_numbers(options)
    named, chosen = named_models(models), [one if isinstance(one, BenchmarkDataset) else BenchmarkDataset(**one) for one in datasets]
    names = [one.shown for one in chosen]
    if len(set(names)) < len(names) or not names:
        msg = f"datasets are called {', '.join(names) or 'nothing'}; expected one or more, each with a name of its own."
        raise SettingError(msg)
    with _table(Path(output)) as folder:
        contestants = _contestants(named, seed=options.get("seed", 0))
        rows: list[dict[str, Any]] = []
        for dataset, one in tqdm([(d, c) for d in chosen for c in contestants], desc="Benchmark", unit=" parts", disable=not progress):
            part = folder / ROWS / f"{_key(dataset, one, options)}.json"
            if not part.is_file():
                found = _judged(dataset, one, options)
                with new_part(part) as partial:
                    partial.write_text(json.dumps(without_nan(found)), encoding="utf-8")
            # A part does not know what a model is called.
            rows += [{"dataset": dataset.shown} | row | one.shown for row in json.loads(part.read_text(encoding="utf-8"))]
        table = pd.DataFrame(rows)
        _write(table, folder, {"models": {name: str(model) for name, model in named.items()}, "datasets": [asdict(one) for one in chosen]} | options)
    return table


@dataclass(frozen=True)
class _Contestant:
    """What is judged in one part: a model, an untrained one, or expression."""

    identity: str
    """All that its figures depend on."""
    shown: dict[str, str]
    """Name and kind in the table; empty for expression, which names itself."""
    model: Any = None
    tokenizer: Any = None


def _contestants(models: Mapping[str, Any], *, seed: int) -> list[_Contestant]:
    found, shapes = [], dict[str, tuple[str, Any, Any]]()
    for name, model in models.items():
        opened = load_model(model)
        tokenizer = tokenizer_of(opened)
        identity = f"{fingerprint_of(opened)} {type(opened).__name__} {tokenizer.gene_table.fingerprint}"
        found.append(_Contestant(identity, {"name": name, "kind": MODEL}, model))
        shapes.setdefault(shape_of(opened.config), (name, opened.config, tokenizer))
    for shape, (name, config, tokenizer) in shapes.items():
        shown = {"name": "untrained" if len(shapes) == 1 else f"untrained, shape of {name}", "kind": UNTRAINED}
        found.append(_Contestant(f"untrained {shape} {seed}", shown, untrained_encoder(config, seed), tokenizer))
    return [*found, _Contestant("expression", {})]


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


def _key(dataset: BenchmarkDataset, one: _Contestant, options: Mapping[str, Any]) -> str:
    facts = asdict(dataset) | {"path": "", "name": "", "content": dataset.content, "model": one.identity, "encoding": ENCODING_VERSION, "version": __version__}
    # Where it is computed, and how many cells at a time, changes nothing that is shown.
    facts |= {name: options[name] for name in SETTINGS if name in options}
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _judged(dataset: BenchmarkDataset, one: _Contestant, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = evaluate_cells(
        {} if one.model is None else {"model": one.model}, dataset.path, labels=dataset.labels, batch=dataset.batch, held_out=dataset.held_out, gene_ids=dataset.gene_ids,
        counts_layer=dataset.counts_layer, genome=dataset.genome, tokenizer=one.tokenizer, untrained=False, baselines=one.model is None, progress=False, **options,
    )  # fmt: skip
    facts = {"cells": len(found.used), "cells_judged": int(found.used.sum()), "notes": found.notes}
    return [judged.row() | facts for judged in found.judged]


def _write(table: pd.DataFrame, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write table, JSON and page, each whole."""
    (folder / "pictures").mkdir(exist_ok=True)
    content = {
        TABLE: str(write_csv(table.drop(columns="notes"), index=False)),
        "benchmark.json": json.dumps(without_nan({"settings": dict(settings), "rows": table.to_dict("records")}), indent=1, ensure_ascii=False),
    }
    for name, text in content.items():
        with new_part(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    shown = [name for name in SUMMING_UP if name in table]
    sections = [Section("Figures", pictures=[_draw(table, figure, folder / "pictures") for figure in shown], points=MEANING)]
    for dataset, rows in table.groupby("dataset", sort=False):
        notes = sorted({note for notes in rows["notes"] for note in notes})
        sections.append(
            Section(
                str(dataset),
                tables=[Table(rows[["name", *shown, "cells_judged"]].to_dict("records"), n_marked=int((rows["kind"] == MODEL).sum()))],
                points=notes,
            )
        )
    sections.append(Section("Settings", settings=yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, allow_unicode=True)))
    subtitle = f"{table['dataset'].nunique()} datasets, {table['name'].nunique()} embeddings; nothing was trained on these cells. geneformer-hf {__version__}."
    with new_part(folder / "report.html") as partial:
        write_page(Page("Benchmark", subtitle, sections), partial)


def _draw(table: pd.DataFrame, figure: str, pictures: Path) -> Path:
    """Draw one figure of every embedding on every dataset."""
    # Datasets have their own numbers of variable genes; the rows are the same.
    names = table["name"].where(table["kind"] != BASELINE, table["name"].str.replace(r" of [\d,]+ variable genes", "", regex=True))
    wide = table.assign(row=names).pivot_table(index="row", columns="dataset", values=figure, sort=False, observed=True, dropna=False)
    path = pictures / f"{figure}.png"
    n_models = table.loc[table["kind"] == MODEL, "name"].nunique()
    plot_table(
        wide.to_numpy(dtype=float),
        list(wide.index),
        [str(name) for name in wide.columns],
        path,
        title=figure.replace("_", " "),
        what="figure",
        n_marked=n_models,
    )
    return path
