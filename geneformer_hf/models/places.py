"""Where a checkpoint is (a folder, a repository on the Hub, the name of a published one), and its files, fetched whole and checked.

Everything that opens a checkpoint by name comes through here, so a download is complete, its content is what the Hub says it is, and
nothing is fetched but settings, tokenizers and weights: never code, never a pickle that was not asked for.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, HubError, like
from ..input_files import read_json_object
from ..pickles import sha256
from .checkpoint_settings import check_folder
from .checkpoints import CHECKPOINTS

TOKENIZER_FILES = ("config.json", "gene_table.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
LEGACY_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
"""Pickled tensors of old checkpoints, which transformers reads with `weights_only`; looked for where there are no others."""
CONVERSION_FILE = "conversion.json"
"""What a converted folder was made from; it goes with no model that is made from it."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""Arguments of every `from_pretrained` that say how to ask the Hub."""

# Of whichever HTTP library the client uses: a connection that breaks is not an OSError.
_WHAT_GOES_WRONG: tuple[type[Exception], ...] = (
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    EntryNotFoundError,
    OSError,
    ValueError,
    RuntimeError,
    # A listing that lacks a field, or has one of another type.
    KeyError,
    TypeError,
    AttributeError,
)
DOWNLOADING = "cannot be downloaded"
_checked: set[tuple[str, int, int]] = set()


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is."""

    name: str
    """Path of a folder, or id of a repository."""
    subfolder: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether this is on this disk."""
        return Path(self.name).is_dir()

    def __str__(self) -> str:
        path = "/".join(part for part in (self.name, self.subfolder) if part)
        return f"{path} (revision {self.revision})" if self.revision else path


def place_of(source: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> Place:
    """Return where a checkpoint is that is named by a folder, a Hub id or the name of a published one, in this order.

    Raises:
        CheckpointError: if it can be none of these.
    """
    name, subfolder = str(source), (subfolder or None)
    if subfolder is not None and (PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts):
        msg = f"subfolder {subfolder!r} leads out of {name}. Name a folder inside."
        raise CheckpointError(msg)
    if Path(name).is_dir():
        return Place(name, subfolder, revision)
    if name in CHECKPOINTS:
        known = CHECKPOINTS[name]
        return Place(known.repository, subfolder or known.subfolder, revision or known.revision)
    if not is_hub_id(name):
        what = "is a file" if Path(name).is_file() else f"does not exist (looked for in {Path.cwd()})"
        msg = f"{name} {what}. Give the folder of a tokenizer or converted checkpoint, a Hub id such as 'name/model', or one of the published checkpoints: {', '.join(CHECKPOINTS)}.{like(name, CHECKPOINTS)}"
        raise CheckpointError(msg)
    return Place(name, subfolder, revision)


def is_hub_id(name: str | Path) -> bool:
    """Return whether something that is not on this disk can be a repository on the Hub: two parts, the first no folder here."""
    parts = Path(name).parts
    return len(parts) == 2 and not str(name).startswith((".", "/", "~")) and not Path(parts[0]).is_dir()


def fetched(place: Place, files: Sequence[str], **options: Any) -> tuple[Path, Place]:
    """Return the folder that holds files of a checkpoint, downloading what is not in the cache yet, and the place with its commit.

    Args:
        files (`Sequence[str]`): names and patterns, in the subfolder of the place.
        options: `HUB_OPTIONS`.

    Raises:
        HubError: if the repository cannot be read, or what came is not what the Hub has.
        CheckpointError: if its settings name code, files or repositories (`checkpoint_settings`).
    """
    if place.is_local:
        folder = Path(place.name) / (place.subfolder or "")
        check_folder(folder)
        return folder, place
    prefix = f"{glob.escape(place.subfolder)}/" if place.subfolder else ""
    patterns = [prefix + name for name in files]
    with hub_errors(place):
        root = Path(snapshot_download(place.name, revision=place.revision, allow_patterns=patterns, **options))
    require_intact(root, place, patterns)
    check_folder(root / (place.subfolder or ""))
    return root / (place.subfolder or ""), replace(place, revision=root.name)


def fetched_checkpoint(place: Place, *, variant: str | None = None, **options: Any) -> tuple[Path, Place]:
    """Return the folder of a checkpoint or adapter, with its tokenizer if it has one, and the place with its commit.

    Weights of a `variant`, such as "fp16" in `model.fp16.safetensors`, come as well.

    Raises:
        HubError: as `fetched`.
        CheckpointError: if there is none.
    """
    more = [name.replace("safetensors", f"{variant}.safetensors", 1) for name in WEIGHTS] if variant else []
    folder, found = fetched(place, (*TOKENIZER_FILES, *ADAPTER_FILES, *WEIGHTS, *more), **options)
    if not place.is_local:
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_FILES[0])):
            msg = f"{place} holds no config.json, so it is no checkpoint. Check the name, and the subfolder."
            raise CheckpointError(msg)
        if not any(folder.glob("*.safetensors")):
            folder, found = fetched(found, LEGACY_WEIGHTS, **options)
    return folder, found


def local_folder(source: str | Path) -> Path:
    """Return the folder on this disk of a checkpoint or adapter, fetched if need be.

    Raises:
        CheckpointError: as `place_of` and `fetched_checkpoint`.
    """
    return fetched_checkpoint(place_of(source))[0]


def converted_from(folder: str | Path) -> Place | None:
    """Return what the weights in a folder were converted from, None where that is not known or they are others by now."""
    path = Path(folder) / CONVERSION_FILE
    if not path.is_file():
        return None
    said = read_json_object(path, error=CheckpointError)
    weights = Path(folder) / WEIGHTS[0]
    if not weights.is_file() or sha256(weights) != said.get("weights_sha256"):
        return None
    name, subfolder, revision = (said.get(field) for field in ("name", "subfolder", "revision"))
    if not isinstance(name, str) or not all(value is None or isinstance(value, str) for value in (subfolder, revision)):
        msg = f"{path} names no place that the weights are from ({name!r}, {subfolder!r}, {revision!r}). Convert the checkpoint again, or remove the file."
        raise CheckpointError(msg)
    return Place(name, subfolder, revision)


def repository_of(source: str | Path | None) -> str | None:
    """Return the repository on the Hub that a checkpoint is from, None where it is from this disk, as far as is known."""
    if source is None:
        return None
    place = place_of(source)
    origin = converted_from(place.name) if place.is_local else place
    return origin.name if origin else None


def short_name(source: str | Path) -> str:
    """Return a checkpoint's name without the folders of this disk: the last two, and no hidden ones.

    Example:
        >>> short_name("/home/me/runs/blood/model"), short_name("/tmp/.x.partial/model"), short_name("lab/model")
        ('blood/model', 'model', 'lab/model')
    """
    return "/".join(part for part in Path(source).parts[-2:] if not part.startswith((".", "/")))


def require_intact(root: Path, place: Place, patterns: Sequence[str]) -> None:
    """Raise if a file that was asked for is not what its name in the cache says: the SHA-256 or git hash that the Hub gave.

    Damaged files are removed, so that the next try fetches them again.

    Raises:
        HubError
    """
    for path in sorted(root.rglob("*")):
        blob = path.resolve()
        # Where the file system has no links the cache holds the files themselves, under names that say nothing.
        if not path.is_file() or blob.parent.name != "blobs" or not any(fnmatch(path.relative_to(root).as_posix(), pattern) for pattern in patterns):
            continue
        state = (str(blob), blob.stat().st_size, blob.stat().st_mtime_ns)
        if state in _checked:
            continue
        if not is_content_of(blob.name, blob):
            size = blob.stat().st_size
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            msg = f"{path.name} of {place} is damaged: its {size:,} bytes do not have the hash {blob.name[:12]}… that the Hub gave. It was removed from the cache; run this again to download it."
            raise HubError(msg)
        _checked.add(state)


def is_content_of(etag: str, blob: Path) -> bool:
    """Return whether a file has the hash its etag is: SHA-256 of large files, git's SHA-1 of small ones; other etags are no hashes."""
    if len(etag) not in (40, 64) or not all(c in "0123456789abcdef" for c in etag):
        return True
    with blob.open("rb") as file:
        if len(etag) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
        content = file.read()
    # Mirrors may say the SHA-1 of the content itself.
    return etag in (hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha1(content).hexdigest())


@contextmanager
def hub_errors(place: Place | str, *, doing: str = DOWNLOADING) -> Iterator[None]:
    """Turn what goes wrong between us and the Hub into an error that says what to do.

    Raises:
        HubError
    """
    try:
        yield
    except _WHAT_GOES_WRONG as error:
        # A full disk or a missing permission speaks for itself.
        if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise HubError(_explained(error, place if isinstance(place, Place) else Place(place), doing)) from error


def _explained(error: BaseException, place: Place, doing: str) -> str:
    """Say what an error of the client means and what to do."""
    login = "Log in with `hf auth login`, or set HF_TOKEN."
    # What the client says when it looked into the cache after all.
    status = getattr(getattr(error, "response", None) or getattr(error.__cause__, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{place.name} is gated: ask for access on its page on the Hub. {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{place.name} is not on the Hub, or is private and this token may not see it. Check the name. {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"{place.name} has no revision {place.revision!r}. Give a branch, a tag or a commit of it."
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        why = f"the Hub answered {status}" if status else "the Hub may not be asked" if is_offline_mode() else "the Hub cannot be reached"
        if doing != DOWNLOADING:
            return f"{place} {doing}: {why}. Check the network (and HF_HUB_OFFLINE)."
        return f"{place} {doing}: it is not whole in the cache, and {why}. Check the network (and HF_HUB_OFFLINE), or give a local folder."
    if isinstance(error, EntryNotFoundError):
        return f"{place} lacks a file that was asked for: {_first_line(error)}"
    if status is not None:
        advice = {401: f"The token is not accepted. {login}", 403: f"This token may not do that. {login}", 429: "The Hub asks for patience: try again later."}
        words = advice.get(status, "Try again later; whole files that came are kept." if status >= 500 else _first_line(error))
        return f"{place.name} {doing}: the Hub answered {status}. {words}"
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        return f"{place} {doing}: the answer of the Hub lacks what the client expects ({type(error).__name__}: {error}). Check the address (HF_ENDPOINT); a mirror may not speak the whole protocol."
    if isinstance(error, HFValidationError):
        return f"{place.name} is no name of a repository: {_first_line(error)}"
    return f"{place} {doing}: {_first_line(error)} Run this again: whole files that came are kept."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
