"""Published dictionaries: found in a folder, known by their SHA-256, read by the restricted reader, and turned into a gene table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VocabularyMismatchError
from ..genes import GeneTable
from ..pickles import read_dictionary, require_content, sha256
from .checkpoints import DICTIONARY_HASHES, DICTIONARY_PATTERNS, SPECIAL_TOKENS
from .places import Place, fetched

FOLDER = "geneformer"
"""Where the published repository keeps its dictionaries, beside its code."""


def folder_of_dictionaries(place: Place, **options: Any) -> Path:
    """Return the folder to look for the dictionaries of a checkpoint in: of its repository, its clone, or its own.

    Raises:
        HubError: as `fetched`.
    """
    if not place.is_local:
        patterns = [f"{FOLDER}/{depth}{pattern}" for pattern in DICTIONARY_PATTERNS.values() for depth in ("", "*/")]
        return fetched(Place(place.name, revision=place.revision), patterns, **options)[0]
    # A checkpoint inside a clone: the dictionaries are in the folder `geneformer` beside it.
    root = Path(place.name)
    folder = root / (place.subfolder or "")
    has_own = any(folder.rglob(DICTIONARY_PATTERNS["tokens"]))
    return folder if has_own else (root if place.subfolder else root.absolute().parent) / FOLDER


def find_dictionaries(folder: Path, vocab_size: int, *, allow_unknown: bool = False) -> dict[str, Path]:
    """Return the four dictionaries of one vocabulary below a folder.

    Where a clone holds those of several, the ones whose token dictionary has as many entries as the model are taken.

    Raises:
        CheckpointError: naming what is missing.
    """
    candidates = [path.parent for path in sorted(folder.rglob(DICTIONARY_PATTERNS["tokens"]))]
    if not candidates:
        msg = f"No {DICTIONARY_PATTERNS['tokens']} below {folder}. Give the folder of the dictionaries with `dictionaries=` (`--dictionaries`): it holds {', '.join(DICTIONARY_PATTERNS.values())}."
        raise CheckpointError(msg)
    complete: list[dict[str, Path]] = []
    missing: list[str] = []
    for place in candidates:
        for tokens in sorted(place.glob(DICTIONARY_PATTERNS["tokens"])):
            # Two generations may share a folder; their names end alike (gc30M, gc104M).
            tail = tokens.stem.removeprefix("token_dictionary")
            found = {kind: place / f"{pattern.split('*')[0]}{tail}.pkl" for kind, pattern in DICTIONARY_PATTERNS.items()}
            lacking = [path.name for path in found.values() if not path.is_file()]
            if lacking:
                missing.append(f"{place}: {', '.join(lacking)}")
            else:
                complete.append(found)
    if not complete:
        msg = f"Dictionaries are incomplete; missing in {'; '.join(missing)}."
        raise CheckpointError(msg)
    if len(complete) == 1 and not missing:
        return complete[0]
    # Nothing is read that is not known by its hash, unless that was allowed.
    published = {known["tokens"] for known in DICTIONARY_HASHES.values()}
    readable = [found for found in complete if allow_unknown or sha256(found["tokens"]) in published]
    fitting = [found for found in readable if len(read_dictionary(found["tokens"])) == vocab_size]
    if not fitting and missing:
        msg = f"No complete dictionaries for a vocabulary of {vocab_size:,}; missing in {'; '.join(missing)}."
        raise CheckpointError(msg)
    # Of those that were not read, whoever asks learns why.
    return (fitting or [found for found in complete if found not in readable] or complete)[0]


def identify(found: dict[str, Path], *, allow_unknown: bool = False) -> str | None:
    """Return the version of published dictionaries by their hashes.

    Raises:
        CheckpointError: if a file is a git-lfs pointer, or its hash is not a published one and unknown ones are not allowed.
    """
    for path in found.values():
        require_content(path)
    hashes = {kind: sha256(path) for kind, path in found.items()}
    for version, known in DICTIONARY_HASHES.items():
        if hashes == known:
            return version
    if allow_unknown:
        return None
    published = {h for known in DICTIONARY_HASHES.values() for h in known.values()}
    strange = [f"{found[kind].name} ({h[:12]}…)" for kind, h in hashes.items() if h not in published] or [path.name for path in found.values()]
    msg = f"{found['tokens'].parent}: {', '.join(strange)} are not the published dictionaries of one version, by SHA-256. Download them again, or pass `allow_unknown_dictionaries=True` (`--allow-unknown-dictionaries`) if they are your own."
    raise CheckpointError(msg)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokens": (lambda v: isinstance(v, Integral) and not isinstance(v, bool) and 0 <= int(v) < 1 << 24, "whole numbers from 0 to 16,777,215"),
    "medians": (lambda v: isinstance(v, Real) and not isinstance(v, bool) and 0 < float(v) < float("inf"), "numbers above 0"),
    "symbols": (lambda v: isinstance(v, str), "Ensembl ids"),
    "aliases": (lambda v: isinstance(v, str), "Ensembl ids"),
}
"""What the values of each published dictionary may be."""


def _values_of(path: Path, kind: str) -> dict[str, Any]:
    """Return a dictionary whose values are of the type that its kind has.

    Raises:
        CheckpointError: naming the first that is not.
    """
    content = read_dictionary(path)
    fits, expected = _VALUES[kind]
    wrong = next((key for key, value in content.items() if not fits(value)), None)
    if wrong is not None:
        shown = repr(content[wrong])
        msg = f"{path}: {wrong!r} has the value {shown if len(shown) <= 100 else shown[:100] + '…'}; expected {expected}. It is another dictionary, or damaged; download it again."
        raise CheckpointError(msg)
    return content


def table_of(found: Mapping[str, Path], *, source: str = "") -> tuple[GeneTable, list[str]]:
    """Return the gene table and the special tokens, in the order of their ids, that four published dictionaries stand for.

    Raises:
        VocabularyMismatchError: if genes have no median.
        CheckpointError: if special tokens stand at ids that genes have left no room for.
    """
    tokens, medians, symbols, renamed = (_values_of(found[kind], kind) for kind in ("tokens", "medians", "symbols", "aliases"))
    genes = [g for g in tokens if g not in SPECIAL_TOKENS]
    without = [g for g in genes if g not in medians]
    if without:
        msg = f"{found['medians']}: {len(without):,} genes of the vocabulary have no median, for instance {', '.join(without[:3])}. The dictionaries belong to different versions."
        raise VocabularyMismatchError(msg)
    symbol_of = {ensembl_id: symbol for symbol, ensembl_id in symbols.items()}
    vocabulary = set(genes)
    # Entries that lead outside the vocabulary, or from a gene to itself, say nothing.
    aliases = {old: new for old, new in renamed.items() if new in vocabulary and old not in vocabulary}
    try:
        table = GeneTable(genes, [tokens[g] for g in genes], [medians[g] for g in genes], [symbol_of.get(g, "") for g in genes], aliases, "human", source)
    except ValueError as error:
        msg = f"{found['tokens'].parent}: the dictionaries make no vocabulary: {error}"
        raise CheckpointError(msg) from error
    taken = set(table.token_ids.tolist())
    free = [i for i in range(len(tokens)) if i not in taken]
    specials = [token for token in SPECIAL_TOKENS if token in tokens]
    wrong = [token for token, i in zip(specials, free, strict=False) if tokens[token] != i]
    if wrong:
        msg = f"{found['tokens']}: the special tokens {', '.join(wrong)} stand at other ids than the free ones. Not a Geneformer vocabulary."
        raise CheckpointError(msg)
    return table, specials
