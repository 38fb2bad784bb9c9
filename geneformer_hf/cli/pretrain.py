"""`geneformer-hf pretrain`."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from .configured import ConfiguredCommand


class Pretrain(ConfiguredCommand):
    """Train a masked-gene model from scratch, or go on from a checkpoint on new domains.

    Stopped or killed, the same command goes on from the last checkpoint. Settings come from a YAML file and from the command line,
    which wins; every argument of transformers' TrainingArguments is one. In several processes:
    torchrun --nproc_per_node 8 -m geneformer_hf pretrain --config run.yaml
    """

    name = "pretrain"
    help = "masked-gene training from scratch or from a checkpoint; one process or many, resumable"

    def settings_class(self) -> Any:
        """Return the class of arguments."""
        from ..training.arguments import GeneformerPretrainingArguments

        return GeneformerPretrainingArguments

    def work(self, arguments: Any, args: Namespace) -> int:
        """Pretrain, and print what held-out cells say."""
        from ..training.pretraining import pretrain

        run = pretrain(arguments)
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
