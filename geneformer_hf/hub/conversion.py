"""How a published checkpoint becomes a folder for the Auto classes.

In the published layout `config.json` says `bert`, there is no tokenizer, and the dictionaries that stand for one are pickles, read by
the restricted reader and known by their SHA-256.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import CheckpointError, VocabularyMismatchError
from ..models.checkpoints import CHECKPOINTS, SPECIAL_TOKENS
from ..models.configuration_geneformer import GeneformerConfig
from ..models.dictionaries import find_dictionaries, folder_of_dictionaries, identify
from ..models.loading import model_class_of, require_checkpoint
from ..models.places import CONVERSION_FILE, Place, fetched_checkpoint, place_of
from ..models.tokenization_geneformer import GENE_TABLE_FILE, GeneformerTokenizer
from ..outputs import new_folder, require_apart, require_free
from ..pickles import read_dictionary, sha256
from ..reports.cards import checkpoint_card
from ..reports.published import FACTS, Facts
from .upstream import classes_of
from .weights import source_tensors

logger = logging.getLogger(__name__)


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
    id_classes: str | Path | None = None,
    label_column: str | None = None,
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
        id_classes (`str` or `Path`, *optional*): of a fine-tuned classifier, its `…_id_class_dict.pkl`, which names its classes.
        label_column (`str`, *optional*): and what it predicts, for the names of columns of predictions.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output if it exists.

    Raises:
        CheckpointError, UnsafePickleError, VocabularyMismatchError, OutputExistsError
    """
    folder, place = _source_folder(source, subfolder, revision)
    require_checkpoint(folder)
    origin = str(replace(place, name=str(Path(place.name).resolve())) if place.is_local else place)
    require_apart(output, [folder, dictionaries, id_classes])
    require_free(Path(output), overwrite=overwrite, made_by="convert", of=origin)
    config = GeneformerConfig.from_pretrained(folder)
    model_class: Any = model_class_of(config, str(folder))
    found = find_dictionaries(
        Path(dictionaries) if dictionaries is not None else folder_of_dictionaries(place), config.vocab_size, allow_unknown=allow_unknown_dictionaries
    )
    version = identify(found, allow_unknown=allow_unknown_dictionaries)
    tokenizer = GeneformerTokenizer.from_dictionaries(found, version=version, model_max_length=config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        msg = f"{folder} has a vocabulary of {config.vocab_size:,} and the dictionaries in {found['tokens'].parent} one of {len(tokenizer):,}. Give the dictionaries of this checkpoint with `dictionaries=` (`--dictionaries`)."
        raise VocabularyMismatchError(msg)
    tensors = source_tensors(folder)
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in loading.items() if name in ("missing_keys", "unexpected_keys", "mismatched_keys") and keys}
    if problems:
        msg = f"{folder}: the weights do not fit {model_class.__name__}: {json.dumps(problems)[:500]}. The checkpoint is incomplete or of another architecture."
        raise CheckpointError(msg)
    model.config.cls_token_id, model.config.eos_token_id = tokenizer.cls_token_id, tokenizer.eos_token_id
    model.config.vocabulary_fingerprint = tokenizer.gene_table.fingerprint
    if id_classes is not None:
        names = classes_of(id_classes, model.config.num_labels)
        model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    if label_column is not None:
        model.config.label_columns = [label_column]
    with new_folder(output, made_by="convert", of=origin, overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "generation_config.json").unlink(missing_ok=True)
        specials = ", ".join(f"`{token}` {tokenizer.convert_tokens_to_ids(token)}" for token in tokenizer.all_special_tokens)
        card = checkpoint_card(
            model.config,
            title=str(source) if _facts_of(place, folder) and str(source) in CHECKPOINTS else f"Geneformer {version or '(own vocabulary)'}",
            vocabulary=f"{len(tokenizer.gene_table):,} human genes; {specials}; gene table `{tokenizer.gene_table.fingerprint}`",
            place=place,
            facts=_facts_of(place, folder),
            version=version,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        n_tensors = _require_equal(partial, tensors, model_class, found["tokens"])
        if not place.is_local:
            made_from = asdict(place) | {"weights_sha256": sha256(partial / SAFE_WEIGHTS_NAME)}
            (partial / CONVERSION_FILE).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    return Conversion(Path(output), model_class.__name__, version, len(tokenizer.gene_table), n_tensors)


def _facts_of(place: Place, folder: Path) -> Facts | None:
    """Return what is known of a published checkpoint, if this is one: of its repository and folder, and with its weights where their hash is known."""
    known = next((c for c in CHECKPOINTS.values() if (c.repository, c.subfolder) == (place.name, place.subfolder)), None)
    if known is None:
        return None
    facts, weights = FACTS[known.name], folder / SAFE_WEIGHTS_NAME
    if facts.weights_sha256 is None or not weights.is_file():
        return facts
    found = sha256(weights)
    if found == facts.weights_sha256:
        return facts
    logger.warning(
        "%s: the weights have the SHA-256 %s, and public users of the checkpoint state %s. Their figures are left out of the card.",
        place,
        found,
        facts.weights_sha256,
    )
    return None


def published_card(name: str) -> str:
    """Return the card of a published checkpoint as `convert` would write it, without having it."""
    known, config = CHECKPOINTS[name], GeneformerConfig.from_preset(name)
    n_special = 2 if config.cls_token_id is None else 4
    specials = ", ".join(f"`{token}` {i}" for i, token in enumerate(SPECIAL_TOKENS[:n_special]))
    vocabulary = f"{config.vocab_size - n_special:,} human genes; {specials}"
    return checkpoint_card(
        config, title=name, vocabulary=vocabulary, place=place_of(name), version=known.version, facts=FACTS[name], folder=name.lower().replace("_", "-")
    )


def _source_folder(source: str | Path, subfolder: str | None, revision: str | None) -> tuple[Path, Place]:
    """Return the folder of a checkpoint that is not converted yet, downloading if need be, and where it is.

    Raises:
        CheckpointError: if there is no such folder or repository.
    """
    place = place_of(source, subfolder=subfolder, revision=revision)
    folder, place = fetched_checkpoint(place)
    if not (folder / "config.json").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        msg = f"{folder} holds no config.json." + (
            f" Name one of its checkpoints with `subfolder=` (`--subfolder`): {', '.join(inside)}." if inside else " Give the folder of a checkpoint."
        )
        raise CheckpointError(msg)
    if (folder / GENE_TABLE_FILE).is_file():
        msg = f"{place} holds {GENE_TABLE_FILE}: it is converted already and opens with the Auto classes."
        raise CheckpointError(msg)
    return folder, place


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
