"""What a finished fine-tuning run shows: figures beside baselines, tables, pictures, one report, a model card; all in the model's folder."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from .._version import __version__
from ..errors import MissingExtraError
from ..models.adapters import ADAPTER_FILE, unwrapped
from ..models.heads import CLASSES, NUMBERS, Head
from ..models.loading import load_model, untrained_encoder
from ..models.places import repository_of, short_name
from ..reports.cards import FineTuningFacts, finetuning_card, occurrences_in_words
from ..reports.classification import RocCurve, figures_of, main_figure, mean_roc, per_class_table, roc_curve
from ..reports.classification_plots import plot_calibration, plot_comparison, plot_confusion, plot_course, plot_numbers, plot_roc
from ..reports.csv_files import write_csv
from ..reports.figures import file_name, write_figures
from ..reports.html import Page, Section, Table, write_page
from .arguments import GeneformerFineTuningArguments
from .checkpointing import CONFIG_FILE, FOLD, UNFINISHED_MODEL, put_model, save_weights
from .comparison import FROZEN, UNTRAINED, cell_baselines, frozen_vectors, gene_baselines
from .configs import resolved, write_config
from .preparing import Prepared
from .tasks import CellTask, GeneTask

logger = logging.getLogger(__name__)

MODEL = "this model"
PLACES = ("output_dir", "train_data", "validation_data", "test_data", "tokenizer", "from_checkpoint", "resume_from_checkpoint", "gene_classes")
COMPARED = {
    CLASSES: ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "log_loss", "ece"),
    "multi_label_classification": ("accuracy", "all_right", "macro_f1", "micro_f1", "roc_auc"),
    NUMBERS: ("r2", "mae", "rmse", "pearson", "spearman"),
}


@dataclass
class Outcome:
    """All that is known when training is over."""

    prepared: Prepared
    trained: list[Any]
    """One `Trained` for each split."""
    final: Any
    asked: GeneformerFineTuningArguments
    seconds: float


@dataclass
class HeadResult:
    """Labels and predictions of one head, split by split."""

    head: Head
    labels: list[np.ndarray]
    predictions: dict[str, list[np.ndarray]]
    """Name (this model first, then baselines) to probabilities of the test items of each split."""

    def figures(self) -> dict[str, Any]:
        """Return figures over all test items, and of each split by itself."""
        found = {}
        for name, parts in self.predictions.items():
            pooled = figures_of(self.head, np.concatenate(self.labels), np.concatenate(parts))
            if len(parts) > 1:
                each = [figures_of(self.head, labels, part) for labels, part in zip(self.labels, parts, strict=True)]
                pooled["folds"] = [{key: fold[key] for key in COMPARED[self.head.kind]} for fold in each]
            found[name] = pooled
        return found


def save_outcome(outcome: Outcome) -> tuple[dict[str, Any], pd.DataFrame]:
    """Measure, draw, and write the final folder, whole or not there; on the main process alone but for the weights."""
    trainer = outcome.final.trainer
    output = Path(str(outcome.asked.output_dir))
    unfinished = output / UNFINISHED_MODEL
    save_weights(trainer, unfinished)
    figures: dict[str, Any] = {}
    predictions = pd.DataFrame()
    if trainer.is_world_process_zero():
        outcome.prepared.tokenizer.save_pretrained(unfinished)
        write_config(outcome.asked, unfinished / CONFIG_FILE)
        figures, predictions = _write_all(outcome, unfinished)
        for path in unfinished.iterdir():
            # safetensors makes files for the owner alone.
            path.chmod(0o644)
        put_model(unfinished, output, made_by="finetune")
    trainer.accelerator.wait_for_everyone()
    return figures, predictions


def _write_all(outcome: Outcome, folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    prepared, task = outcome.prepared, outcome.prepared.task
    tested = [split for split in prepared.splits if len(split.test)]
    results: list[HeadResult] = []
    notes = list(prepared.notes)
    if tested:
        results = _cell_results(outcome, task, notes) if isinstance(task, CellTask) else [_gene_result(outcome, task, notes)]
    figures: dict[str, Any] = {
        "heads": {result.head.name: result.figures() for result in results},
        "n_train": len(prepared.splits[0].train),
        "n_test": sum(len(split.test) for split in prepared.splits),
        "folds": len(prepared.splits) if len(prepared.splits) > 1 else None,
        "trained_parameters": outcome.final.n_trained,
        "parameters": outcome.final.n_parameters,
        "seconds": round(outcome.seconds, 1),
        "notes": notes,
    }
    if isinstance(task, GeneTask) and tested:
        figures["per_occurrence"] = _occurrences(outcome, task)
    history = {f"{FOLD}{i + 1}" if len(outcome.trained) > 1 else "training": t.history for i, t in enumerate(outcome.trained)}
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    predictions = _predictions(outcome, results) if results else pd.DataFrame()
    if results:
        write_csv(predictions, folder / "predictions.csv", index=False)
    write_csv(_split_table(prepared, outcome.asked.group_column), folder / "splits.csv", index=False)
    for result in results:
        write_csv(per_class_table(figures["heads"][result.head.name][MODEL]), folder / f"per_class_{file_name(result.head.name)}.csv", index=False)
        if result.head.kind == CLASSES:
            names = result.head.names
            confusion = pd.DataFrame(figures["heads"][result.head.name][MODEL]["confusion"], index=pd.Index(names, name="true"), columns=names)
            write_csv(confusion, folder / f"confusion_{file_name(result.head.name)}.csv")
    pictures = _draw(outcome, results, figures, history, folder)
    write_figures(figures, folder / "figures.json")
    settings = {name: value for name, value in resolved(outcome.asked).items() if name not in PLACES} | _names_of_places(outcome.asked)
    _write_report(outcome, results, figures, pictures, settings, folder)
    start = outcome.asked.from_checkpoint
    facts = FineTuningFacts(
        config=unwrapped(outcome.final.trainer.accelerator.unwrap_model(outcome.final.trainer.model)).config,
        what=", ".join(result.head.name for result in results) or ", ".join(outcome.asked.label or ["gene classes"]),
        heads=[(h.name, h.names, h.kind) for h in (task.heads if isinstance(task, CellTask) else [task.head])],
        of_genes=isinstance(task, GeneTask),
        figures=figures,
        compared=COMPARED,
        settings=settings,
        started_from=short_name(start) if start else None,
        base_model=repository_of(start),
        datasets=outcome.prepared.cells.repositories,
        is_adapter=(folder / ADAPTER_FILE).is_file(),
        seed=outcome.asked.seed,
        split_lines=_split_lines(outcome),
    )
    (folder / "README.md").write_text(finetuning_card(facts, name=Path(str(outcome.asked.output_dir)).name), encoding="utf-8")
    return figures, predictions


def _names_of_places(arguments: GeneformerFineTuningArguments) -> dict[str, Any]:
    """Return what data and checkpoint were used, without the folders of this machine."""
    found: dict[str, Any] = {}
    for name in ("train_data", "validation_data", "test_data", "gene_classes", "from_checkpoint"):
        value = getattr(arguments, name)
        if value:
            found[name] = [Path(str(one)).name for one in value] if isinstance(value, list) else short_name(str(value))
    return found


def _cell_results(outcome: Outcome, task: CellTask, notes: list[str]) -> list[HeadResult]:
    prepared = outcome.prepared
    baselines = _cell_baselines(outcome, task, notes)
    results = []
    for head in task.heads:
        labels = [task.labels_of(head)[split.test] for split in prepared.splits]
        if head.kind == CLASSES and not any((part >= 0).any() for part in labels):
            notes.append(f"{head.name}: no test cell has a label, so nothing is measured")
            continue
        found: dict[str, list[np.ndarray]] = {MODEL: [head.probabilities(t.logits) for t in outcome.trained]}
        for name in baselines[0].get(head.name, {}) if baselines else ():
            found[name] = [part[head.name][name] for part in baselines]
        results.append(HeadResult(head, labels, found))
    return results


def _cell_baselines(outcome: Outcome, task: CellTask, notes: list[str]) -> list[dict[str, dict[str, np.ndarray]]]:
    arguments, prepared = outcome.asked, outcome.prepared
    if not arguments.baselines:
        return []
    config = unwrapped(outcome.final.trainer.model).config
    corpus = outcome.final.trainer.mixture.corpora[0]
    rows = np.unique(np.concatenate([np.concatenate([split.train, split.test]) for split in prepared.splits]))
    vectors = {}
    try:
        checkpoint = load_model(arguments.from_checkpoint)
        vectors[FROZEN] = frozen_vectors(checkpoint, corpus, rows, pooling=config.pooling)
        vectors[UNTRAINED] = frozen_vectors(untrained_encoder(config, arguments.seed), corpus, rows, pooling=config.pooling)
        return [cell_baselines(prepared.cells, task, split, arguments, vectors, config) for split in prepared.splits]
    except MissingExtraError as error:
        notes.append(f"no baselines: {error}")
        return []


def _gene_result(outcome: Outcome, task: GeneTask, notes: list[str]) -> HeadResult:
    prepared, classes = outcome.prepared, task.classes
    labels = [classes.class_ids[split.test] for split in prepared.splits]
    found = {MODEL: [t.scores.means(classes.token_ids[split.test]) for t, split in zip(outcome.trained, prepared.splits, strict=True)]}
    if outcome.asked.baselines:
        try:
            found |= gene_baselines(prepared.cells, task, prepared.splits, prepared.rows)
        except MissingExtraError as error:
            notes.append(f"no baselines: {error}")
    return HeadResult(task.head, labels, found)


def _occurrences(outcome: Outcome, task: GeneTask) -> dict[str, Any]:
    """Return figures in which each gene counts once for every cell that expresses it, as the published package reports them."""
    scores = [t.scores for t in outcome.trained]
    found = figures_of(task.head, np.concatenate([s.classes_m for s in scores]).astype(np.int64), np.concatenate([s.probabilities_mc for s in scores]))
    keep = {key: found[key] for key in ("n", "accuracy", "macro_f1", "balanced_accuracy", "roc_auc", "confusion")}
    if len(task.classes.names) == 2:
        curves = [roc_curve(s.classes_m == 1, s.probabilities_mc[:, 1]) for s in scores]
        for name, weighted in (("by_length", True), ("plain", False)):
            mean = mean_roc(curves, weighted=weighted)
            keep[f"mean_auc_{name}"], keep[f"sd_auc_{name}"] = mean.auc, mean.sd
        keep["auc_of_folds"] = [curve.auc for curve in curves]
    return keep


def _predictions(outcome: Outcome, results: list[HeadResult]) -> pd.DataFrame:
    """Return a table with a line for each test cell or gene."""
    prepared, task = outcome.prepared, outcome.prepared.task
    rows = np.concatenate([split.test for split in prepared.splits])
    if isinstance(task, CellTask):
        table = pd.DataFrame({"row": rows, "cell_id": [prepared.cells.cell_ids[row] for row in rows.tolist()]})
    else:
        tokens = task.classes.token_ids[rows]
        names = prepared.tokenizer.gene_table.ensembl_of_tokens(tokens.tolist())
        n_cells = np.concatenate([t.scores.n_cells_v[task.classes.token_ids[s.test]] for t, s in zip(outcome.trained, prepared.splits, strict=True)])
        table = pd.DataFrame({"ensembl_id": names, "n_cells": n_cells})
    if len(prepared.splits) > 1:
        table["fold"] = np.repeat(np.arange(1, len(prepared.splits) + 1), [len(split.test) for split in prepared.splits])
    columns: dict[str, Any] = {}
    for result in results:
        head, p, labels = result.head, np.concatenate(result.predictions[MODEL]), np.concatenate(result.labels)
        if head.kind == CLASSES:
            classes = np.array([*head.names, ""], dtype=object)
            columns[f"{head.name}_true"], columns[f"{head.name}_predicted"] = classes[np.where(labels >= 0, labels, len(head.names))], classes[p.argmax(axis=1)]
            columns |= {f"{head.name}_probability_{name}": p[:, i] for i, name in enumerate(head.names)}
        else:
            suffix = "predicted" if head.kind == NUMBERS else "probability"
            for i, name in enumerate(head.names):
                columns |= {f"{name}_true": labels[:, i], f"{name}_{suffix}": p[:, i]}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _split_table(prepared: Prepared, group_column: str | None = None) -> pd.DataFrame:
    """Return on which side of each split every cell or gene was."""
    task = prepared.task
    if isinstance(task, CellTask):
        n, table = len(prepared.cells.part), pd.DataFrame({"row": np.arange(len(prepared.cells.part)), "cell_id": prepared.cells.cell_ids})
    else:
        names = prepared.tokenizer.gene_table.ensembl_of_tokens(task.classes.token_ids.tolist())
        n, table = len(names), pd.DataFrame({"ensembl_id": names, "class": np.array(task.classes.names, dtype=object)[task.classes.class_ids]})
    if group_column:
        table[group_column] = prepared.cells.columns[group_column]
    for number, split in enumerate(prepared.splits):
        table["split" if len(prepared.splits) == 1 else f"fold_{number + 1}"] = split.names(n)
    return table


def _draw(outcome: Outcome, results: list[HeadResult], figures: dict[str, Any], history: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Draw everything, where matplotlib is installed; return the pictures of each head, and those of training under ""."""
    pictures: dict[str, list[Path]] = {"": [folder / "training.png"]}
    try:
        plot_course(history, folder / "training.png", metric=outcome.final.trainer.args.metric_for_best_model or "eval_macro_f1")
        for result in results:
            pictures[result.head.name] = list(_draw_head(outcome, result, figures, folder))
    except MissingExtraError as error:
        logger.warning("No pictures: %s", error)
        figures["notes"].append(f"no pictures: {error}")
    return pictures


def _draw_head(outcome: Outcome, result: HeadResult, figures: dict[str, Any], folder: Path) -> Any:
    head, found = result.head, figures["heads"][result.head.name]
    stem, main = file_name(head.name), main_figure(head.kind)
    what = "cells" if isinstance(outcome.prepared.task, CellTask) else "genes"
    of = f"{found[MODEL]['n']:,} test {what}"
    values = {name: [fold[main] for fold in one["folds"]] if "folds" in one else [one[main]] for name, one in found.items()}
    plot_comparison(values, folder / f"comparison_{stem}.png", title=f"{head.name}, {of}", what=main.replace("_", " "))
    yield folder / f"comparison_{stem}.png"
    labels, p = np.concatenate(result.labels), np.concatenate(result.predictions[MODEL])
    if head.kind == CLASSES:
        plot_confusion(found[MODEL]["confusion"], head.names, folder / f"confusion_{stem}.png", title=f"{head.name}, {of}", what=what)
        yield folder / f"confusion_{stem}.png"
    if head.kind != NUMBERS:
        curves, means = _curves(outcome, result)
        if curves:
            plot_roc(curves, folder / f"roc_{stem}.png", title=f"{head.name}, {of}", **means)
            yield folder / f"roc_{stem}.png"
    if head.kind == CLASSES:
        plot_calibration(found[MODEL]["calibration"], folder / f"calibration_{stem}.png", title=f"Calibration of {head.name}", error=found[MODEL]["ece"])
        yield folder / f"calibration_{stem}.png"
    elif head.kind == NUMBERS:
        for i, name in enumerate(head.names):
            plot_numbers(labels[:, i], p[:, i], folder / f"predicted_{file_name(name)}.png", title=f"{name}, {of}")
            yield folder / f"predicted_{file_name(name)}.png"


def _curves(outcome: Outcome, result: HeadResult) -> tuple[dict[str, RocCurve], dict[str, RocCurve]]:
    """Return the curves to draw: of folds with their means for two classes, else of each class against the rest."""
    head, means = result.head, {}
    if len(head.names) == 2 and head.kind == CLASSES:
        parts = [(labels == 1, p[:, 1], labels >= 0) for labels, p in zip(result.labels, result.predictions[MODEL], strict=True)]
        curves = {f"fold {i + 1}": roc_curve(y[known], s[known]) for i, (y, s, known) in enumerate(parts) if 0 < y[known].sum() < known.sum()}
        if len(curves) > 1:
            means = {"mean": mean_roc(list(curves.values()), weighted=True), "plain": mean_roc(list(curves.values()), weighted=False)}
        return ({head.names[1]: curves["fold 1"]} if len(parts) == 1 and curves else curves), means
    labels, p = np.concatenate(result.labels), np.concatenate(result.predictions[MODEL])
    known = labels >= 0 if head.kind == CLASSES else np.ones(len(labels), dtype=bool)
    curves = {}
    for i, name in enumerate(head.names):
        positive = (labels[known] == i) if head.kind == CLASSES else labels[:, i] > 0.5
        if 0 < positive.sum() < len(positive):
            curves[name] = roc_curve(positive, p[known, i])
    return curves, {}


def kind_of(found: dict[str, Any]) -> str:
    """Return the problem_type that figures are of."""
    one = found[MODEL]
    return CLASSES if "confusion" in one else NUMBERS if "r2" in one else "multi_label_classification"


def comparison_rows(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return a line for the model and each baseline; with folds the spread of the main figure as well."""
    rows = []
    for name, one in found.items():
        row: dict[str, Any] = {"": name} | {key: float(one[key]) for key in COMPARED[kind]}
        if "folds" in one:
            main = main_figure(kind)
            row |= {f"SD of {main} over folds": float(np.std([fold[main] for fold in one["folds"]]))}
        rows.append(row)
    return rows


def verdict_of(found: dict[str, Any], kind: str) -> str:
    """Say in a sentence how the model did beside its baselines, whichever way it came out."""
    main = main_figure(kind)
    what = main.replace("_", " ")
    mine, others = found[MODEL][main], {name: one[main] for name, one in found.items() if name != MODEL}
    if not others:
        return f"{what} {mine:.3f} on {found[MODEL]['n']:,} test items; nothing to compare it with."
    best = max(others, key=lambda name: others[name])
    n, noise = found[MODEL]["n"], 1 / max(found[MODEL]["n"], 1) ** 0.5
    if abs(mine - others[best]) < noise and kind != NUMBERS:
        return f"{what} {mine:.3f}, and {others[best]:.3f} of the best baseline ({best}): too close to tell on {n:,} test items, where differences of {noise:.2f} are chance."
    if mine > others[best]:
        return f"{what} {mine:.3f}, {mine - others[best]:.3f} above the best baseline ({best}, {others[best]:.3f}), on {n:,} test items."
    return f"{what} {mine:.3f}: a baseline does as well or better ({best}, {others[best]:.3f}). Train longer, with another learning rate or from a larger checkpoint, or use the baseline."


def _write_report(
    outcome: Outcome, results: list[HeadResult], figures: dict[str, Any], pictures: dict[str, list[Path]], settings: dict[str, Any], folder: Path
) -> None:
    prepared = outcome.prepared
    sections = []
    for result in results:
        found = figures["heads"][result.head.name]
        also = [occurrences_in_words(figures["per_occurrence"])] if "per_occurrence" in figures else []
        each = found[MODEL].get("per_class") or found[MODEL].get("per_column") or ()
        sections.append(
            Section(
                title=result.head.name,
                verdict=" ".join([verdict_of(found, result.head.kind), *also]),
                tables=[Table(comparison_rows(found, result.head.kind), n_marked=1)],
                pictures=pictures.get(result.head.name, []),
                further=[Table(each, title="By column" if result.head.kind == NUMBERS else "By class")],
            )
        )
    if pictures[""]:
        sections.append(Section("Training", pictures=pictures[""]))
    balance = [({"fold": i + 1} if len(prepared.balance) > 1 else {}) | row for i, table in enumerate(prepared.balance) for row in table.to_dict("records")]
    sections.append(Section("Split", lines=_split_lines(outcome), tables=[Table(balance)]))
    if figures["notes"]:
        sections.append(Section("Left out, and other remarks", points=figures["notes"]))
    sections.append(Section("Settings", settings=yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)))
    write_page(
        Page(
            title=f"Fine-tuned: {', '.join(result.head.name for result in results) or 'no test'}",
            subtitle=f"{figures['trained_parameters']:,} of {figures['parameters']:,} parameters trained; {figures['seconds']:,.0f} seconds; geneformer-hf {__version__}.",
            sections=sections,
        ),
        folder / "report.html",
    )


def _split_lines(outcome: Outcome) -> list[str]:
    """Say how many cells or genes were on which side, and what was kept together."""
    prepared = outcome.prepared
    what = "cells" if isinstance(prepared.task, CellTask) else "genes"
    sizes = [
        f"{f'Fold {i + 1}: ' if len(prepared.splits) > 1 else ''}{len(s.train):,} {what} to train, {len(s.validation):,} to choose the epoch, {len(s.test):,} to test."
        for i, s in enumerate(prepared.splits)
    ]
    column = outcome.asked.group_column
    if column:
        sizes.append(f"Every {column} is wholly on one side.")
    return sizes
