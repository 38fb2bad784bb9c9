"""The parser of the command line: what is misspelt is named first, with what was meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import like

_CHOICE = re.compile(r"invalid choice: '(?P<word>.*?)' \(choose from (?P<choices>.*)\)")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no abbreviations and proposes what is spelt alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    @property
    def options(self) -> set[str]:
        """The options there are, those of groups among them."""
        return {name for action in self._actions for name in action.option_strings}

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and exit with 2."""
        if found := _CHOICE.search(message):
            message += like(found["word"], re.findall(r"[^\s',]+", found["choices"]))
        super().error(message)

    def require_known_options(self, words: Sequence[str]) -> None:
        """Exit with 2 if one of the words is an option that is not known; argparse would name what is missing first."""
        for word in words:
            if word == "--":
                return
            name = word.split("=", 1)[0]
            if re.match(r"--\w|-[A-Za-z]", word) and name not in self.options and word[:2] not in self.options:
                self.error(f"unknown option {name}.{like(name, self.options)}")
