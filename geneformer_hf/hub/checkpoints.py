"""Published Geneformer checkpoints: where they are, and how one becomes a folder for the Auto classes.

All knowledge of the published layout is here: `config.json` says `bert`, there is no tokenizer, and the dictionaries that
stand for one are pickles, read by the restricted reader and known by their SHA-256.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from ..errors import CheckpointError, VocabularyMismatchError
from ..genes import GeneTable
from ..models.configuration_geneformer import GeneformerConfig
from ..models.loading import model_class_of, require_checkpoint
from ..models.tokenization_geneformer import GENE_TABLE_FILE, GeneformerTokenizer
from ..outputs import new_folder
from ..pickles import read_dictionary, require_content, sha256
from ..reports.cards import checkpoint_card

logger = logging.getLogger(__name__)

REPOSITORY = "ctheodoris/Geneformer"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    name: str
    """Name of the preset, which is also its shape in `GeneformerConfig.from_preset`."""
    subfolder: str
    """Folder in the repository."""
    version: str
    """`V1` (30 M cells, 2,048 genes) or `V2` (95 to 104 M cells, 4,096 with special tokens)."""
    repository: str = REPOSITORY
    revision: str | None = None
    """Only where a source states one; None is the newest, unpinned."""


CHECKPOINTS: dict[str, Checkpoint] = {
    c.name: c
    for c in (
        Checkpoint("Geneformer-V1-10M", "Geneformer-V1-10M", "V1"),
        Checkpoint("Geneformer-V2-104M", "Geneformer-V2-104M", "V2"),
        Checkpoint("Geneformer-V2-104M_CLcancer", "Geneformer-V2-104M_CLcancer", "V2"),
        Checkpoint("Geneformer-V2-316M", "Geneformer-V2-316M", "V2"),
        Checkpoint("gf-6L-30M-i2048", "gf-6L-30M-i2048", "V1"),
        Checkpoint("gf-12L-30M-i2048", "gf-12L-30M-i2048", "V1"),
        Checkpoint("gf-12L-95M-i4096", "gf-12L-95M-i4096", "V2"),
        Checkpoint("gf-12L-95M-i4096-CLcancer", "gf-12L-95M-i4096_CLcancer", "V2"),
        Checkpoint("gf-20L-95M-i4096", "gf-20L-95M-i4096", "V2"),
    )
}

DICTIONARY_PATTERNS = {
    "tokens": "token_dictionary*.pkl",
    "medians": "gene_median_dictionary*.pkl",
    "symbols": "gene_name_id_dict*.pkl",
    "aliases": "ensembl_mapping_dict*.pkl",
}

# SHA-256 of the published dictionaries; gc95M and gc104M are the same bytes under two names.
DICTIONARY_HASHES: dict[str, dict[str, str]] = {
    "V1": {
        "tokens": "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",
        "medians": "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
        "symbols": "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",
        "aliases": "eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869",
    },
    "V2": {
        "tokens": "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",
        "medians": "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
        "symbols": "fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1",
        "aliases": "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
    },
}

SPECIAL_TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>")


@dataclass(frozen=True)
class Conversion:
    """What a conversion made."""

    output: Path
    architecture: str
    version: str | None
    """`V1`, `V2`, or None for dictionaries that are not the published ones."""
    n_genes: int
    n_tensors: int
    """Tensors compared with the source, every one equal."""


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dictionaries: str | Path | None = None,
    allow_unknown_dictionaries: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Turn a published checkpoint into a folder that opens with the Auto classes.

    The folder holds `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`, `gene_table.json` and
    `README.md`. Before success is reported it is opened again, and every tensor and token id is compared with the source.

    Args:
        source (`str` or `Path`): preset name (`CHECKPOINTS`), Hub id, or a folder: of a clone, or of one checkpoint.
        output (`str` or `Path`): a new folder.
        subfolder, revision (`str`, *optional*): within the repository or clone.
        dictionaries (`str` or `Path`, *optional*):
            Folder with `token_dictionary*.pkl`, `gene_median_dictionary*.pkl`, `gene_name_id_dict*.pkl` and
            `ensembl_mapping_dict*.pkl`; otherwise looked for in the source.
        allow_unknown_dictionaries (`bool`, *optional*, defaults to `False`):
            Accept dictionaries whose hash is not a published one, for models with a vocabulary of their own.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output if it exists.

    Raises:
        CheckpointError, UnsafePickleError, VocabularyMismatchError, OutputExistsError
    """
    folder, root = fetch(source, subfolder=subfolder, revision=revision)
    require_checkpoint(folder)
    config = GeneformerConfig.from_pretrained(folder)
    model_class: Any = model_class_of(config, str(folder))
    found = find_dictionaries(Path(dictionaries) if dictionaries is not None else root, config.vocab_size)
    version = identify(found, allow_unknown=allow_unknown_dictionaries)
    tokenizer = tokenizer_from_dictionaries(
        found, model_max_length=config.max_position_embeddings, source=f"published {version} dictionaries" if version else "own dictionaries"
    )
    if len(tokenizer) != config.vocab_size:
        msg = f"{folder} has a vocabulary of {config.vocab_size:,} and the dictionaries in {found['tokens'].parent} one of {len(tokenizer):,}. Give the dictionaries of this checkpoint with `dictionaries=` (`--dictionaries`)."
        raise VocabularyMismatchError(msg)
    try:
        tensors = source_tensors(folder)
    except Exception as error:
        msg = f"{folder}: the weights cannot be read ({type(error).__name__}: {error}). Download them again."
        raise CheckpointError(msg) from error
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in loading.items() if name in ("missing_keys", "unexpected_keys", "mismatched_keys") and keys}
    if problems:
        msg = f"{folder}: the weights do not fit {model_class.__name__}: {json.dumps(problems)[:500]}. The checkpoint is incomplete or of another architecture."
        raise CheckpointError(msg)
    model.config.cls_token_id, model.config.eos_token_id = tokenizer.cls_token_id, tokenizer.eos_token_id
    model.config.vocabulary_fingerprint = tokenizer.gene_table.fingerprint
    with new_folder(output, overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "generation_config.json").unlink(missing_ok=True)
        specials = ", ".join(f"`{token}` {tokenizer.convert_tokens_to_ids(token)}" for token in tokenizer.all_special_tokens)
        card = checkpoint_card(
            model.config,
            title=f"Geneformer {version or '(own vocabulary)'}",
            vocabulary=f"{len(tokenizer.gene_table):,} human genes; {specials}; gene table `{tokenizer.gene_table.fingerprint}`",
            origin=describe_source(source, subfolder, revision),
            version=version,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        n_tensors = _require_equal(partial, tensors, model_class, found["tokens"])
    return Conversion(Path(output), model_class.__name__, version, len(tokenizer.gene_table), n_tensors)


def published_card(name: str) -> str:
    """Return the card of a published checkpoint as `convert` would write it, without having it."""
    known, config = CHECKPOINTS[name], GeneformerConfig.from_preset(name)
    n_special = 2 if config.cls_token_id is None else 4
    specials = ", ".join(f"`{token}` {i}" for i, token in enumerate(SPECIAL_TOKENS[:n_special]))
    vocabulary = f"{config.vocab_size - n_special:,} human genes; {specials}"
    return checkpoint_card(config, title=name, vocabulary=vocabulary, origin=describe_source(name, None, None), version=known.version, folder=name.lower())


def describe_source(source: str | Path, subfolder: str | None, revision: str | None) -> str:
    """Return where a checkpoint comes from, for its card; local paths stay out of it."""
    if str(source) in CHECKPOINTS:
        known = CHECKPOINTS[str(source)]
        return f"{known.repository}, {known.subfolder}, revision {revision or known.revision or 'unpinned'}"
    if Path(source).is_dir():
        return f"a local folder ({subfolder or Path(source).name})"
    return f"{source}, {subfolder or 'root'}, revision {revision or 'unpinned'}"


def fetch(source: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> tuple[Path, Path]:
    """Return the folder of a checkpoint and the folder to look for dictionaries in, downloading if need be.

    Raises:
        CheckpointError: if there is no such folder or repository.
    """
    local = Path(source)
    if local.is_dir():
        folder = local / subfolder if subfolder else local
        if not (folder / "config.json").is_file():
            inside = sorted(p.parent.name for p in local.glob("*/config.json"))
            msg = f"{folder} holds no config.json." + (
                f" Name one of its checkpoints with `subfolder=` (`--subfolder`): {', '.join(inside)}." if inside else " Give the folder of a checkpoint."
            )
            raise CheckpointError(msg)
        if (folder / GENE_TABLE_FILE).is_file():
            msg = f"{folder} holds {GENE_TABLE_FILE}: it is converted already and opens with the Auto classes."
            raise CheckpointError(msg)
        # A checkpoint inside a clone: the dictionaries are in the folder `geneformer` beside it.
        has_own = any(folder.rglob(DICTIONARY_PATTERNS["tokens"]))
        return folder, folder if has_own else (local if subfolder else local.absolute().parent) / "geneformer"
    known = CHECKPOINTS.get(str(source))
    if known is not None:
        repository, subfolder, revision = known.repository, subfolder or known.subfolder, revision or known.revision
    else:
        repository = str(source)
        if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
            msg = f"{source} is neither a folder, nor a Hub id (name/model), nor one of the presets: {', '.join(CHECKPOINTS)}."
            raise CheckpointError(msg)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}{name}" for name in ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin")]
    patterns += [f"geneformer/{p}" for p in DICTIONARY_PATTERNS.values()] + [f"geneformer/*/{p}" for p in DICTIONARY_PATTERNS.values()]
    try:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
        msg = f"{repository} (revision {revision or 'newest'}) cannot be downloaded: {str(error).splitlines()[0]} Check the name and the network, or give a local folder."
        raise CheckpointError(msg) from error
    folder = root / subfolder if subfolder else root
    if not (folder / "config.json").is_file():
        msg = f"{repository} has no checkpoint in {subfolder or 'its root'}."
        raise CheckpointError(msg)
    return folder, root


def find_dictionaries(folder: Path, vocab_size: int) -> dict[str, Path]:
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
    fitting = [found for found in complete if len(read_dictionary(found["tokens"])) == vocab_size]
    if not fitting and missing:
        msg = f"No complete dictionaries for a vocabulary of {vocab_size:,}; missing in {'; '.join(missing)}."
        raise CheckpointError(msg)
    return (fitting or complete)[0]


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


def tokenizer_from_dictionaries(found: dict[str, Path], *, model_max_length: int, source: str = "") -> GeneformerTokenizer:
    """Build the tokenizer that four published dictionaries stand for."""
    tokens, medians = read_dictionary(found["tokens"]), read_dictionary(found["medians"])
    genes = [g for g in tokens if g not in SPECIAL_TOKENS]
    without = [g for g in genes if g not in medians]
    if without:
        msg = f"{found['medians']}: {len(without):,} genes of the vocabulary have no median, for instance {', '.join(without[:3])}. The dictionaries belong to different versions."
        raise VocabularyMismatchError(msg)
    symbol_of = {ensembl_id: symbol for symbol, ensembl_id in read_dictionary(found["symbols"]).items()}
    vocabulary = set(genes)
    # Entries that lead outside the vocabulary, or from a gene to itself, say nothing.
    aliases = {old: new for old, new in read_dictionary(found["aliases"]).items() if new in vocabulary and old not in vocabulary}
    table = GeneTable(genes, [tokens[g] for g in genes], [medians[g] for g in genes], [symbol_of.get(g, "") for g in genes], aliases, "human", source)
    has_specials = "<cls>" in tokens and "<eos>" in tokens
    tokenizer = GeneformerTokenizer(
        gene_table=table, cls_token="<cls>" if has_specials else None, eos_token="<eos>" if has_specials else None, model_max_length=model_max_length
    )
    wrong = [token for token in SPECIAL_TOKENS if token in tokens and tokenizer.convert_tokens_to_ids(token) != tokens[token]]
    if wrong:
        msg = f"{found['tokens']}: the special tokens {', '.join(wrong)} stand at other ids than the free ones. Not a Geneformer vocabulary."
        raise CheckpointError(msg)
    return tokenizer


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint as they are on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if not tensors:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            tensors |= torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _require_equal(converted: Path, source: dict[str, torch.Tensor], model_class: Any, token_dictionary: Path) -> int:
    """Open the converted folder as a user will and compare it with the source."""
    reloaded = model_class.from_pretrained(converted)
    ours = reloaded.state_dict()
    compared = 0
    for name, tensor in source.items():
        # Position ids are a constant that old releases stored.
        if name.endswith("position_ids"):
            continue
        if name not in ours or not torch.equal(ours[name].cpu(), tensor.to(ours[name].dtype)):
            msg = f"{converted}: {name} differs from the source after the conversion. Nothing was written; please report this."
            raise CheckpointError(msg)
        compared += 1
    tokenizer = AutoTokenizer.from_pretrained(converted)
    if tokenizer.get_vocab() != read_dictionary(token_dictionary):
        msg = f"{converted}: token ids differ from {token_dictionary} after the conversion. Nothing was written; please report this."
        raise CheckpointError(msg)
    return compared
