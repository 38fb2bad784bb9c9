"""Entry point of `geneformer-hf`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout

from .._version import __version__
from ..errors import GeneformerError, like
from .attention import Attention
from .benchmark import Benchmark
from .command import Command
from .convert import Convert
from .demo import Demo
from .embed import Embed
from .evaluate import Evaluate
from .export import Export
from .finetune import Finetune
from .info import Info
from .medians import Medians
from .parser import Parser
from .perturb import Perturb
from .predict import Predict
from .pretrain import Pretrain
from .pull import Pull
from .push import Push
from .qc import Qc
from .search import Search
from .stats import Stats
from .task import Task
from .terminal import printable
from .tokenize import Tokenize

COMMANDS: tuple[type[Command], ...] = (
    Demo,
    Info,
    Convert,
    Export,
    Tokenize,
    Embed,
    Evaluate,
    Benchmark,
    Attention,
    Qc,
    Medians,
    Pretrain,
    Finetune,
    Search,
    Predict,
    Task,
    Perturb,
    Stats,
    Push,
    Pull,
)


def build_parser() -> Parser:
    """Return the parser with every command."""
    return _build()[0]


def _build() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and those of the commands by their names."""
    parser = Parser(prog="geneformer-hf", description="Geneformer for the Hugging Face ecosystem: single cells in, embeddings out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    by_name: dict[str, Parser] = {}
    for cls in COMMANDS:
        command = cls()
        sub = by_name[command.name] = commands.add_parser(command.name, help=command.help, description=cls.__doc__, add_help=not command.takes_rest)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, takes_rest=command.takes_rest, when_interrupted=command.when_interrupted)
    return parser, by_name


def _require_known_words(parser: Parser, commands: Mapping[str, Parser], words: Sequence[str]) -> None:
    """Exit with 2 if the command, or an option before or after it, is misspelt."""
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    parser.require_known_options(words[:place])
    if place == len(words):
        return
    name = words[place]
    if name not in commands:
        parser.error(f"unknown command {name!r}.{like(name, [*commands])} Commands: {', '.join(commands)}.")
    if not commands[name].get_default("takes_rest"):
        commands[name].require_known_options(words[place + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 refused or failed with a message, 2 wrong usage, 130 interrupted."""
    parser, commands = _build()
    _require_known_words(parser, commands, sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with printable(sys.stdout) as out, printable(sys.stderr) as err, redirect_stdout(out), redirect_stderr(err):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run the command that was parsed."""
    _quieten()
    if threading.current_thread() is threading.main_thread():
        # What a batch queue sends at the end of its patience: stop as Ctrl-C does, and say so.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.run(args)
    except GeneformerError as error:
        if args.debug:
            raise
        sys.stderr.write(f"geneformer-hf {args.command}: {error}\n")
    except OSError as error:
        # A full disk, a missing permission: the operating system's words name the file.
        if args.debug:
            raise
        sys.stderr.write(f"geneformer-hf {args.command}: {error}\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"geneformer-hf {args.command}: interrupted; {args.when_interrupted}.\n")
        return 130
    return 1


def _quieten() -> None:
    """Leave our own messages and progress bars on the terminal, and not those of the libraries below."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not sys.stderr.isatty():
        # In a log every update of a bar is a line; tqdm reads these when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # It tells of parts for machines that this is not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="anndata|zarr|umap|scanpy|torch")


if __name__ == "__main__":
    sys.exit(main())
