"""`geneformer-hf pretrain`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .command import Command


class Pretrain(Command):
    """Train a masked-gene model from scratch, or go on from a checkpoint on new domains.

    Stopped or killed, the same command goes on from the last checkpoint. Settings come from a YAML file and from the command line,
    which wins; every argument of transformers' TrainingArguments is one. In several processes:
    torchrun --nproc_per_node 8 -m geneformer_hf pretrain --config run.yaml
    """

    name = "pretrain"
    help = "masked-gene training from scratch or from a checkpoint; one process or many, resumable"
    takes_rest = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--config", metavar="FILE|RECIPE", help="settings in YAML, or the name of a recipe that comes with the package")
        parser.add_argument("-h", "--help", action="store_true", help="this, and the settings that are ours")
        parser.add_argument("--help-all", action="store_true", help="the settings of transformers' Trainer as well")
        self._parser = parser

    def run(self, args: Namespace) -> int:
        from ..training.arguments import GeneformerPretrainingArguments as Arguments
        from ..training.configs import describe_settings, parse_arguments, read_config, recipe_names

        if args.help or args.help_all:
            print(self._parser.format_help())
            print(f"recipes: {', '.join(recipe_names(Arguments))}\n")
            print(describe_settings(Arguments, inherited=args.help_all))
            return 0
        from ..training.checkpointing import checkpoints_in
        from ..training.pretraining import pretrain

        arguments = parse_arguments(Arguments, read_config(args.config, Arguments) if args.config else {}, args.rest)
        try:
            run = pretrain(arguments)
        except KeyboardInterrupt:
            checkpoints = checkpoints_in(Path(str(arguments.output_dir)))
            where = (
                f"goes on from {checkpoints[-1]}" if checkpoints else f"begins anew, for there is no checkpoint yet (save_steps is {arguments.save_steps:g})"
            )
            sys.stderr.write(f"geneformer-hf pretrain: interrupted; the same command {where}.\n")
            return 130
        if arguments.process_index == 0:
            print_run(run)
        return 0


def print_run(run: Any) -> None:
    """Print what held-out cells say, and where things are."""
    from ..reports.cards import verdict

    print(f"\n{run.figures['steps']:,} steps, {run.figures['epochs'] or 0:.2f} epochs.")
    for name, found in run.figures["held_out"].items():
        after, before, base = found["after"], found["before"], found["baselines"]
        rows = [("this model", after["loss"], after["loss_at_mask"]), ("gene frequency", base["gene_frequency"], base["gene_frequency_at_mask"]),
                ("gene frequency by rank", base["rank_frequency"], base["rank_frequency_at_mask"])]  # fmt: skip
        if before:
            rows.insert(1, ("this model before", before["loss"], before["loss_at_mask"]))
        print(f"\n{name}: {found['cells']:,} {'cells of ' + found['evaluated_on'] if found['evaluated_on'] else 'held-out cells'}")
        print(
            f"  {'loss (nats) at':26}{'all ' + format(base['hidden_genes'], ',') + ' hidden genes':>26}{'the ' + format(base['hidden_by_mask'], ',') + ' masked ones':>26}"
        )
        for what, everywhere, there in rows:
            print(f"  {what:26}{everywhere:26.3f}{there:26.3f}")
        for key, what in (("accuracy_top1", "top-1 accuracy"), ("accuracy_top10", "top-10 accuracy")):
            print(f"  {what:26}{after[key]:26.3f}{after[key + '_at_mask']:26.3f}")
        print(f"  {verdict(found)}")
    print(f"\nModel, tokenizer, card, figures, loss curve: {run.folder}{os.sep}")
