"""`geneformer-hf search`."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from .configured import ConfiguredCommand
from .finetune import print_outcome


class Search(ConfiguredCommand):
    """Look for the settings that do best on validation cells, then fine-tune with them and test.

    The YAML file holds settings of finetune, and a part `search` with the space: which settings to try, and how often. Stopped or killed, the
    same command goes on with the trials that are missing; started several times at once, the processes share the trials.
    """

    name = "search"
    help = "hyperparameters by Optuna: pruned, resumable, in parallel; the best run refitted"
    own_keys = ("search",)

    def settings_class(self) -> Any:
        """Return the class of arguments."""
        from ..training.arguments import GeneformerFineTuningArguments

        return GeneformerFineTuningArguments

    def without_own(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Keep the part `search` aside."""
        self._search = settings.get("search")
        return {name: value for name, value in settings.items() if name != "search"}

    _search: Any = None

    def help_of_own(self) -> str:
        """Describe the part `search`."""
        from ..training.search_settings import HELP

        return HELP

    def work(self, arguments: Any, args: Namespace) -> int:
        """Search, refit, and print the trials."""
        from ..training.search import search
        from ..training.search_settings import read_search

        found = search(arguments, read_search(self._search, where=str(args.config or "command line")))
        print(f"\n{found.trials.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
        print(
            f"\nBest: {found.value:.4f} with {', '.join(f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}' for name, value in found.best.items())}"
        )
        print(f"Table, pictures and settings of the best trial: {found.folder}{os.sep}")
        if found.refitted is not None:
            print_outcome(found.refitted.figures, found.refitted.folder)
        return 0

    def what_goes_on(self, arguments: Any) -> str:
        """Say where the same command goes on after an interruption."""
        return "the same command goes on with the trials that are missing."
