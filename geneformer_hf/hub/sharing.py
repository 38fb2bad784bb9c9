"""Folders to the Hub and back: models, adapters, tokenizers and datasets, whole, in one commit.

Tokens, retries and the transfer itself are `huggingface_hub`'s. Files that are on the Hub already are not sent again, and a download
that broke off goes on with the files that are missing.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, snapshot_download

from .._version import __version__
from ..errors import CheckpointError, HubError
from ..models.adapters import describe_adapter, is_adapter
from ..models.places import ADAPTER_FILES, LEGACY_WEIGHTS, WEIGHTS, Place, hub_errors, is_content_of
from ..models.tokenization_geneformer import GENE_TABLE_FILE
from ..outputs import require_apart, unfinished
from .folders import CARD, Folder, describe_folder, is_beside_tables, is_shared
from .tables import PARQUET_PATTERN, read_tables, write_tables

WRITING = "cannot be written"


@dataclass(frozen=True)
class Pushed:
    """What was pushed."""

    repository: str
    url: str
    """Of the commit, or of the pull request."""
    revision: str
    """The commit."""
    kind: str
    files: list[str]
    left_out: list[str]
    n_bytes: int
    is_new: bool
    """False if all of it was there already, so that no commit was made."""
    base: Place | None
    """Of an adapter: where its model is."""


@dataclass(frozen=True)
class Pulled:
    """What was pulled."""

    output: Path
    repository: str
    revision: str
    """The commit."""
    kind: str
    left_out: list[str]
    """Files of the repository that were not fetched: code, pickles, hidden ones."""
    base: Place | None
    """Of an adapter: where its model is."""


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Put a folder on the Hub, whole, in one commit; datasets as Parquet, which `datasets.load_dataset` reads.

    Args:
        folder (`str` or `Path`): of a model, an adapter, a tokenizer or a tokenized dataset.
        repository (`str`): its id, such as "name/model", or "model" of one's own; it is made if it is not there.
        private (`bool`, *optional*): for a new repository.
        revision (`str`, *optional*): branch, made if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
        base (`str`, *optional*): of an adapter that was trained on a folder of this disk: where that model is on the Hub.
        message (`str`, *optional*): of the commit.
        token (`str`, *optional*): in place of the one `huggingface_hub` finds.

    Raises:
        CheckpointError: if the folder cannot be shared (see `describe_folder`).
        HubError: if the Hub refuses, or cannot be reached.
    """
    found = describe_folder(folder, base=base)
    kind = "dataset" if found.kind == "dataset" else "model"
    api = HfApi(token=token, library_name="geneformer_hf", library_version=__version__)
    if "/" not in repository:
        with hub_errors(Place(repository), doing=WRITING):
            repository = f"{api.whoami()['name']}/{repository}"
    with tempfile.TemporaryDirectory() as temporary:
        content = _content(found) | (write_tables(found.path, Path(temporary), repository) if kind == "dataset" else {})
        # The Hub is asked last: what cannot be shared leaves no empty repository behind.
        with hub_errors(Place(repository, revision=revision), doing=WRITING):
            repository = api.create_repo(repository, private=private, repo_type=kind, exist_ok=True).repo_id
            if private and not api.repo_info(repository, repo_type=kind).private:
                msg = f"{repository} is there already, and public: private is for a new repository. Nothing was pushed; change it on its page, or choose another name."
                raise HubError(msg)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repository, branch=revision, repo_type=kind, exist_ok=True)
            head = str(api.repo_info(repository, repo_type=kind, revision=revision).sha)
            there = [one.path for one in _tree(api, repository, kind, head)]
            _require_one_kind(repository, there, found.kind)
            if found.has_plain_card and CARD in there:
                # Somebody wrote one, and we know no more.
                del content[CARD]
            operations: list[Any] = [CommitOperationAdd(name, str(one) if isinstance(one, Path) else one) for name, one in content.items()]
            operations += [CommitOperationDelete(name) for name in _replaced(there, content, found.kind)]
            made = api.create_commit(
                repository, operations, commit_message=message or f"Upload {found.kind} with geneformer_hf {__version__}", repo_type=kind, revision=revision, create_pr=create_pr, parent_commit=head
            )  # fmt: skip
        n_bytes = sum(one.stat().st_size if isinstance(one, Path) else len(one) for one in content.values())
    return Pushed(repository, made.pr_url or made.commit_url, made.oid, found.kind, sorted(content), found.left_out, n_bytes, made.oid != head, found.base)


def _content(found: Folder) -> dict[str, Path | bytes]:
    return {name: found.changed.get(name, found.path / name) for name in found.files}


REPLACED = {
    "model": (*WEIGHTS, *LEGACY_WEIGHTS),
    "adapter": ("adapter_model*.safetensors", "adapter_model.bin"),
    "tokenizer": (),
    "dataset": (PARQUET_PATTERN,),
}
"""What an earlier push of the same kind may have left, and would be read beside the new."""


def _replaced(there: Iterable[str], content: Iterable[str], kind: str) -> list[str]:
    """Return the weights or tables of an earlier push that these take the place of."""
    patterns = REPLACED[kind]
    return [
        name for name in there if name not in set(content) and any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]


def _require_one_kind(repository: str, there: Iterable[str], kind: str) -> None:
    """Raise if a model would lie beside an adapter: one of them would never be opened.

    Raises:
        HubError
    """
    names = set(there)
    other = "an adapter" if kind == "model" and ADAPTER_FILES[0] in names else "a model" if kind == "adapter" and names & {WEIGHTS[0], WEIGHTS[1]} else None
    if other:
        msg = f"{repository} holds {other}, and {'an' if kind == 'adapter' else 'a'} {kind} beside it would not be opened, or in its place. Nothing was pushed: choose another repository."
        raise HubError(msg)


def _tree(api: HfApi, repository: str, kind: str, revision: str | None) -> list[RepoFile]:
    return [one for one in api.list_repo_tree(repository, recursive=True, revision=revision, repo_type=kind) if isinstance(one, RepoFile)]


def pull_folder(
    repository: str,
    output: str | Path,
    *,
    kind: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> Pulled:
    """Fetch a repository into a folder: whole, every hash compared, or not there; a call that broke off goes on with the files that are missing.

    Datasets come as a folder for `datasets.load_from_disk`. Code, pickles and hidden files stay where they are.

    Args:
        repository (`str`): its id.
        output (`str` or `Path`): a new folder.
        kind (`"model"` or `"dataset"`, *optional*): if there is one of each by that name.
        revision (`str`, *optional*): branch, tag or commit.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output if it exists.

    Raises:
        HubError: if the repository cannot be read, or what came is damaged.
        CheckpointError: if it holds nothing that can be used.
        OutputExistsError
    """
    output, place = Path(output), Place(repository, revision=revision)
    require_apart(output, [Path.cwd()])
    api = HfApi(token=token, library_name="geneformer_hf", library_version=__version__)
    with unfinished(output, overwrite=overwrite, made_by="pull", of=repository) as work:
        with hub_errors(place):
            kind = kind or _kind_of(api, repository, revision)
            commit = str(api.repo_info(repository, repo_type=kind, revision=revision).sha)
            tree = _tree(api, repository, kind, commit)
            _require_inside(place, [one.path for one in tree])
            wanted = {one.path: one for one in tree if is_shared(one.path)}
            left_out = [one.path for one in tree if one.path not in wanted and one.path != ".gitattributes"]
            _require_useful(repository, list(wanted), left_out, kind)
            part = work.parts / f"{commit}"
            # Names are known by now; the client matches patterns.
            patterns = [glob.escape(name) for name in wanted]
            snapshot_download(repository, repo_type=kind, revision=commit, local_dir=part, allow_patterns=patterns, token=token)
        _require_intact(part, wanted, place)
        # The client's own notes.
        shutil.rmtree(part / ".cache", ignore_errors=True)
        whole = part
        if kind == "dataset":
            whole = work.folder / "whole"
            # Of a call that was killed here.
            shutil.rmtree(whole, ignore_errors=True)
            read_tables(part, whole, repository)
            for name in filter(is_beside_tables, wanted):
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(part / name, whole / name)
        base = describe_adapter(whole).base_place if is_adapter(whole) else None
        made = "dataset" if kind == "dataset" else "adapter" if base else "model" if (whole / "config.json").is_file() else "tokenizer"
        work.put_in_place(whole)
    return Pulled(output, repository, commit, made, left_out, base)


def _require_inside(place: Place, names: Iterable[str]) -> None:
    """Raise if a file of a repository would be written outside of the folder.

    Raises:
        HubError
    """
    outside = [name for name in names if name.startswith(("/", "\\")) or ":" in name or ".." in name.replace("\\", "/").split("/")]
    if outside:
        msg = f"{place} holds a file named {outside[0]!r}, which leads out of the folder it is fetched to. Nothing was fetched: do not trust this repository."
        raise HubError(msg)


def _kind_of(api: HfApi, repository: str, revision: str | None) -> str:
    """Return whether a repository is of a model or a dataset.

    Raises:
        HubError: if there is one of each.
    """
    kinds = [kind for kind in ("model", "dataset") if api.repo_exists(repository, repo_type=kind)]
    if len(kinds) == 2:
        msg = f"{repository} is a model and a dataset. Say which with `kind=` (--kind)."
        raise HubError(msg)
    # If it is neither, the question is asked again, for the answer that says why.
    return kinds[0] if kinds else "model"


def _require_useful(repository: str, wanted: list[str], left_out: list[str], kind: str) -> None:
    """Raise if there is nothing in a repository that this package could open.

    Raises:
        CheckpointError
    """
    if kind == "dataset":
        if not any(fnmatch(name, "*.parquet") for name in wanted):
            msg = f"{repository} is a dataset without Parquet files. Open it with datasets.load_dataset."
            raise CheckpointError(msg)
        return
    if GENE_TABLE_FILE in wanted or ADAPTER_FILES[0] in wanted or "model.safetensors" in wanted or "model.safetensors.index.json" in wanted:
        if GENE_TABLE_FILE not in wanted and any(name.endswith(".pkl") for name in left_out):
            msg = f"{repository} is laid out as the published checkpoints are, with pickles in place of a tokenizer. Get a checkpoint of it with `geneformer-hf convert {repository} OUTPUT [--subfolder …]`."
            raise CheckpointError(msg)
        return
    pickled = [name for name in left_out if name.endswith((".bin", ".pt", ".pkl"))]
    why = (
        f"its weights are pickles ({', '.join(pickled[:3])}); open it with load_model, and save it"
        if pickled
        else "it holds none of model.safetensors, adapter_config.json and gene_table.json"
    )
    msg = f"{repository} cannot be pulled: {why}."
    raise CheckpointError(msg)


def _require_intact(folder: Path, wanted: dict[str, RepoFile], place: Place) -> None:
    """Raise if a file is not what the Hub says it is; it is removed, so that the next call fetches it again.

    Raises:
        HubError
    """
    for name, one in wanted.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != one.size or not is_content_of(one.lfs.sha256 if one.lfs else one.blob_id, path):
            path.unlink(missing_ok=True)
            msg = f"{name} of {place} came damaged: it does not have the size and hash that the Hub gave. Run this again to fetch it anew."
            raise HubError(msg)
