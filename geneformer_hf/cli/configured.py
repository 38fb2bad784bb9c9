"""Commands whose settings come from a YAML file and from the command line, which wins."""

from __future__ import annotations

import sys
from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .command import Command


class ConfiguredCommand(Command):
    """A command that takes every argument of transformers' TrainingArguments, and ours."""

    takes_rest = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--config", metavar="FILE|RECIPE", help="settings in YAML, or the name of a recipe that comes with the package")
        parser.add_argument("-h", "--help", action="store_true", help="this, and the settings that are ours")
        parser.add_argument("--help-all", action="store_true", help="the settings of transformers' Trainer as well")
        self._parser = parser

    @abstractmethod
    def settings_class(self) -> Any:
        """Return the class of arguments."""

    @abstractmethod
    def work(self, arguments: Any, args: Namespace) -> int:
        """Do it and return the exit code."""

    def run(self, args: Namespace) -> int:
        from ..training.configs import describe_settings, parse_arguments, read_config, recipe_names

        kind = self.settings_class()
        if args.help or args.help_all:
            print(self._parser.format_help())
            print(self.help_of_own())
            print(f"recipes: {', '.join(recipe_names(kind))}\n")
            print(describe_settings(kind, inherited=args.help_all))
            return 0
        arguments = parse_arguments(kind, self.without_own(read_config(args.config, kind, also=self.own_keys) if args.config else {}), args.rest)
        try:
            return self.work(arguments, args)
        except KeyboardInterrupt:
            sys.stderr.write(f"geneformer-hf {self.name}: interrupted; {self.what_goes_on(arguments)}\n")
            return 130

    own_keys: tuple[str, ...] = ()
    """Keys of the YAML file that are the command's own."""

    def help_of_own(self) -> str:
        """Describe the command's own keys."""
        return ""

    def without_own(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Take out of the settings what is the command's own."""
        return settings

    def what_goes_on(self, arguments: Any) -> str:
        """Say where the same command goes on after an interruption."""
        from ..training.checkpointing import checkpoints_in

        checkpoints = checkpoints_in(Path(str(arguments.output_dir)))
        folds = sorted(Path(str(arguments.output_dir)).glob("fold-*"))
        if folds:
            return f"the same command goes on from {folds[-1]}."
        if checkpoints:
            return f"the same command goes on from {checkpoints[-1]}."
        when = f"save_steps is {arguments.save_steps:g}" if arguments.save_strategy.value == "steps" else f"save_strategy is {arguments.save_strategy.value}"
        return f"the same command begins anew, for there is no checkpoint yet ({when})."
