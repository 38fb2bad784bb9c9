"""`geneformer-hf finetune`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from .configured import ConfiguredCommand


class Finetune(ConfiguredCommand):
    """Teach a pretrained model labels of cells (any column of obs) or genes, and test it beside baselines on the same split.

    Stopped or killed, the same command goes on from the last checkpoint. Settings come from a YAML file and from the command line,
    which wins; every argument of transformers' TrainingArguments is one. For example:
    geneformer-hf finetune --from_checkpoint MODEL --train_data cells.h5ad --label cell_type --output_dir run
    """

    name = "finetune"
    help = "labels of cells or genes: full, LoRA or 4-bit; tested beside baselines"

    def settings_class(self) -> Any:
        """Return the class of arguments."""
        from ..training.arguments import GeneformerFineTuningArguments

        return GeneformerFineTuningArguments

    def work(self, arguments: Any, args: Namespace) -> int:
        """Fine-tune, and print what was measured."""
        from ..training.finetuning import finetune

        run = finetune(arguments)
        if arguments.process_index == 0:
            print_outcome(run.figures, run.folder)
        return 0


def print_outcome(figures: dict[str, Any], folder: Path) -> None:
    """Print the figures of each head beside its baselines, and where things are."""
    from ..reports.cards import occurrences_in_words
    from ..training.outcomes import comparison_rows, kind_of, verdict_of

    for name, found in figures["heads"].items():
        kind = kind_of(found)
        rows = comparison_rows(found, kind)
        print(f"\n{name}: {next(iter(found.values()))['n']:,} test items{', in folds' if figures['folds'] else ''}")
        keys = [key for key in rows[0] if key]
        titles = [key.replace("_", " ") for key in keys[:4]]
        print(f"  {'':58}{''.join(f'{title:>19}' for title in titles)}")
        for row in rows:
            print(f"  {row['']:58}{''.join(f'{row[key]:19.3f}' for key in keys[:4])}")
        print(f"  {verdict_of(found, kind)}")
    if "per_occurrence" in figures:
        print(f"\n{occurrences_in_words(figures['per_occurrence'])}")
    print(f"\nModel, tokenizer, card, figures, predictions: {folder}{os.sep}. Look at {folder / 'report.html'}")
