"""`geneformer-hf task`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .command import KINDS, Command, add_overwrite


class Task(Command):
    """Run a published transfer task on a checkpoint: dosage sensitivity, promoters, networks, cell types, disease, differentiation, integration.

    Without a name, the tasks are listed; with a name alone, what it needs is told. Further arguments are those of `finetune` and win over the
    recipe's: --num_train_epochs 3. For batch-integration they are those of `evaluate` on how models are judged: --pooling mean.
    """

    name = "task"
    help = "the published transfer tasks as recipes: what each needs, and its figures beside the published ones"
    takes_rest = True
    when_interrupted = "the same command goes on from the last checkpoint, where there is one"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("task", nargs="?", help="name of the task (default: list all)")
        parser.add_argument("--model", help="checkpoint: folder or Hub id")
        parser.add_argument("--cells", help=f"{KINDS}, or folder of a tokenized dataset")
        parser.add_argument("--genes", type=Path, metavar="FILE", help="classes of genes: JSON, the published pickle, .csv or .tsv")
        parser.add_argument("--label", metavar="COL", help="column of obs to predict, or to judge by (default: the recipe's)")
        parser.add_argument("--group", metavar="COL", help="column whose values, such as individuals, are each wholly on one side (default: the recipe's)")
        parser.add_argument("--batch", metavar="COL", help="column of batches, for batch-integration (default: the recipe's)")
        parser.add_argument("--output", type=Path, metavar="DIR", help="new folder")
        parser.add_argument("-h", "--help", action="help", help="show this")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..errors import SettingError
        from ..transfer_tasks import EMBEDDING, fine_tuning_settings, load_task, run_task, task_names

        if args.task is None:
            for name in task_names():
                print(f"{name:34}{load_task(name).question}")
            return 0
        task = load_task(args.task)
        if args.model is None and args.cells is None and args.output is None:
            print(f"{task.title}. {task.question}\nSource: {task.source}. Published: {task.published}.")
            for role, need in task.needs.items():
                columns = ", ".join(f"{key} {getattr(need, key)}" for key in ("label", "group", "batch") if getattr(need, key))
                print(f"--{role}: {need.what}.\n  format: {need.format}\n  published: {need.where}{f'{chr(10)}  columns: {columns}' if columns else ''}")
            return 0
        missing = [f"--{name}" for name in ("model", "output") if getattr(args, name) is None]
        if missing:
            msg = f"the task {task.name!r} needs {' and '.join(missing)} as well."
            raise SettingError(msg)
        task.require(cells=args.cells, genes=args.genes)
        given = {"output": args.output, "cells": args.cells, "genes": args.genes, "label": args.label, "group": args.group, "overwrite": args.overwrite}
        if task.kind == EMBEDDING:
            from .evaluate import print_table

            judged = run_task(task, args.model, **given, batch=args.batch, settings=_of_evaluation(args.rest, f"geneformer-hf task {task.name}"))
            print_table(judged.table)
            print(f"{judged.verdict()}\nPublished: {task.published}.\nLook at {args.output / 'report.html'}")
            return 0
        from ..training.arguments import GeneformerFineTuningArguments
        from ..training.configs import parse_arguments
        from ..training.finetuning import finetune
        from .finetune import print_outcome

        recipe = fine_tuning_settings(task, args.model, **given)
        arguments = parse_arguments(GeneformerFineTuningArguments, recipe, args.rest)
        run = finetune(arguments)
        if arguments.process_index == 0:
            print_outcome(run.figures, run.folder)
            print(f"Published: {task.published}.")
        return 0


def _of_evaluation(words: list[str], prog: str) -> dict[str, Any]:
    """Read further arguments as those of `evaluate`."""
    from .evaluate import add_judging, embedding_options

    parser = ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    add_judging(parser)
    args = parser.parse_args(words)
    return embedding_options(args) | {"n_folds": args.folds, "seed": args.seed}
