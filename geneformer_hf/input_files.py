"""Input files before anything in them is read: regular files only, JSON and YAML of bounded size and depth."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from .errors import CellFileError, GeneformerError

MOST_JSON_BYTES = 256 << 20
MOST_YAML_BYTES = 1 << 20
MOST_YAML_NUMBER = 100
"""Characters of a value that is not quoted and may be a number: to the base of 60 or 16, a long one takes minutes to read."""
MOST_YAML_NODES = 100_000
"""Nodes of a YAML document with every alias written out."""
MOST_DEPTH = 100
"""Lists and mappings inside each other, in JSON and YAML."""

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

_KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def require_regular(path: str | Path, *, error: type[GeneformerError] = CellFileError) -> None:
    """Raise if a path is a pipe, device, socket or a loop of symbolic links; opening one could wait without end.

    A path that does not exist passes: whoever opens it says what was expected there.

    Raises:
        GeneformerError: of the class given.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path.stat would do the same
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as problem:
        msg = f"{str(path)!r} cannot be opened: {getattr(problem, 'strerror', None) or problem}. Give the path of a regular file or folder."
        raise error(msg) from problem
    for matches, kind in _KINDS:
        if matches(mode):
            msg = f"{path} is {kind}; expected a regular file or folder. Write its content to a file first."
            raise error(msg)


def read_text(path: Path, *, most_bytes: int = MOST_JSON_BYTES, error: type[GeneformerError] = CellFileError) -> str:
    """Return the text of a regular file of bounded size.

    Raises:
        GeneformerError: of the class given, if the file is special, too large or not UTF-8.
        OSError: if it cannot be read.
    """
    require_regular(path, error=error)
    size = path.stat().st_size
    if size > most_bytes:
        msg = f"{path} has {size:,} bytes; expected at most {most_bytes:,} for a file of settings. Check that it is the file you mean."
        raise error(msg)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        msg = f"{path} is not text in UTF-8 ({problem}). Write or download it again."
        raise error(msg) from problem


def read_json(path: Path, *, error: type[GeneformerError] = CellFileError) -> Any:
    """Return the content of a JSON file of bounded size and depth.

    Raises:
        GeneformerError: of the class given, saying where the text stops being JSON.
        OSError: if it cannot be read.
    """
    text = read_text(path, error=error)
    try:
        content = json.loads(text)
        if "\\u" in text and not _is_writable(content):
            msg = f"{path} holds a text with NUL (\\u0000) or half of a character (\\ud800 to \\udfff alone), which no table can hold. Correct it, or download it again."
            raise error(msg)
        return content
    except RecursionError:
        msg = f"{path} nests lists or objects too deeply to be read. It is damaged, or was made to do harm; write or download it again."
        raise error(msg) from None
    except ValueError as problem:
        if isinstance(problem, GeneformerError):
            raise
        msg = f"{path} cannot be read: it is not JSON ({problem}). Write or download it again."
        raise error(msg) from problem


def _is_writable(content: Any) -> bool:
    """Return whether every text of a JSON document can be written into a table or a file of cells."""
    plain = json.dumps(content, ensure_ascii=False)
    try:
        plain.encode()
    except UnicodeEncodeError:
        return False
    return _NUL.search(plain) is None


def read_json_object(path: Path, *, error: type[GeneformerError] = CellFileError) -> dict[str, Any]:
    """Return the content of a JSON file that holds one object.

    Raises:
        GeneformerError: as `read_json`, and for any other value.
    """
    content = read_json(path, error=error)
    if not isinstance(content, dict):
        msg = f"{path} holds a JSON {_json_name(content)}; expected an object of names and values. Write or download it again."
        raise error(msg)
    return content


def load_yaml(text: str, where: str, *, error: type[GeneformerError] = CellFileError) -> Any:
    """Return the content of a YAML document: plain values only, aliases counted as often as they are used.

    Raises:
        GeneformerError: of the class given, if the document is not YAML, or grows past `MOST_YAML_NODES` or `MOST_DEPTH`.
    """
    import yaml

    if len(text) > MOST_YAML_BYTES:
        msg = f"{where} has {len(text):,} characters; expected at most {MOST_YAML_BYTES:,} for settings. Check that it is the file you mean."
        raise error(msg)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        n_nodes, depth = _expanded(node)
        _require_short_numbers(node, where, error)
        if n_nodes > MOST_YAML_NODES or depth > MOST_DEPTH:
            msg = (
                f"{where} stands for {n_nodes:,} values, {depth:,} levels deep, once its aliases (*name) are written out; expected at most "
                f"{MOST_YAML_NODES:,} and {MOST_DEPTH}. Write the values instead of aliases."
            )
            raise error(msg)
        return yaml.safe_load(text)
    except RecursionError:
        msg = f"{where} nests lists or mappings too deeply, or in itself. Write the values out."
        raise error(msg) from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as problem:
        if isinstance(problem, GeneformerError):
            raise
        msg = f"{where} is not valid YAML: {' '.join(str(problem).split())}"
        raise error(msg) from problem


def _require_short_numbers(root: Any, where: str, error: type[GeneformerError]) -> None:
    import yaml

    seen: set[int] = set()
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp") and len(node.value) > MOST_YAML_NUMBER:
                msg = f"{where} holds a number of {len(node.value):,} characters ({node.value[:20]}…); expected at most {MOST_YAML_NUMBER}. Put text in quotes."
                raise error(msg)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]


def _expanded(root: Any) -> tuple[int, int]:
    """Return the nodes and levels of a YAML document with every alias written out; a node inside itself is too deep."""
    import yaml

    known: dict[int, tuple[int, int]] = {}

    def visit(node: Any, above: tuple[int, ...]) -> tuple[int, int]:
        if id(node) in known:
            return known[id(node)]
        if id(node) in above or len(above) > MOST_DEPTH:
            raise RecursionError
        inside: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        below = [visit(child, (*above, id(node))) for child in inside]
        known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((d for _, d in below), default=0)
        return known[id(node)]

    return visit(root, ())


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
