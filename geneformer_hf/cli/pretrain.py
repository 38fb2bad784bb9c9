"""`geneformer-hf pretrain`."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
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
    when_interrupted = "the same command goes on from the last checkpoint"
    takes_rest = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--config", metavar="FILE|RECIPE", help="settings in YAML, or the name of a recipe that comes with the package")
        parser.add_argument("-h", "--help", action="store_true", help="this, and the settings that are ours")
        parser.add_argument("--help-all", action="store_true", help="the settings of transformers' Trainer as well")
        self._parser = parser

    def run(self, args: Namespace) -> int:
        from ..training.arguments import describe_settings, parse_arguments, read_config, recipe_names

        if args.help or args.help_all:
            print(self._parser.format_help())
            print(f"recipes: {', '.join(recipe_names())}\n")
            print(describe_settings(inherited=args.help_all))
            return 0
        from ..training.pretraining import pretrain

        arguments = parse_arguments(read_config(args.config) if args.config else {}, args.rest)
        run = pretrain(arguments)
        if arguments.process_index == 0:
            print_run(run)
        return 0


def print_run(run: Any) -> None:
    """Print what held-out cells say, and where things are."""
    print(f"\n{run.figures['steps']:,} steps, {run.figures['epochs'] or 0:.2f} epochs.")
    for name, found in run.figures["held_out"].items():
        after, before, base = found["after"], found["before"], found["baselines"]
        print(f"""
{name}: {found["cells"]:,} held-out cells, {base["hidden_genes"]:,} hidden genes
  masked-gene loss (nats)    {after["loss"]:8.3f}   perplexity {after["perplexity"]:,.1f}, top-1 {after["accuracy_top1"]:.3f}, top-10 {after["accuracy_top10"]:.3f}
  gene frequency             {base["gene_frequency"]:8.3f}
  gene frequency by rank     {base["rank_frequency"]:8.3f}""")
        if before:
            print(
                f"  this model before          {before['loss']:8.3f}   {'better' if after['loss'] < before['loss'] else 'worse'} by {abs(after['loss'] - before['loss']):.3f}"
            )
    print(f"\nModel, tokenizer, card, figures, loss curve: {run.folder}{os.sep}")
