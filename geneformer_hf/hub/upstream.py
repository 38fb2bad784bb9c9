"""What upstream Geneformer's own tools left on disk: the classes of a fine-tuned folder, and multi-task models as its `mtl` module saves them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SettingError
from ..input_files import read_json_object
from ..models.configuration_geneformer import GeneformerConfig
from ..models.modeling_geneformer import GeneformerForMultiTaskClassification
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import new_folder
from ..pickles import read_class_ids, read_label_mappings
from .weights import source_tensors

MULTI_TASK_FILES = ("pytorch_model.bin", "config.json", "hyperparameters.json")
LABEL_MAPPINGS = "task_label_mappings.pkl"
HEAD = re.compile(r"classification_heads\.(\d+)\.(weight|bias)")


def classes_of(path: str | Path, n_classes: int) -> dict[int, str]:
    """Return the names of classes by their id, from an `…_id_class_dict.pkl`.

    Raises:
        CheckpointError: if it is not that, or has other classes than the model.
        UnsafePickleError
    """
    found = read_class_ids(Path(path))
    if sorted(found) != list(range(n_classes)):
        msg = (
            f"{path} names the classes {', '.join(map(str, sorted(found)[:10]))}, and the model has {n_classes}, numbered from 0. It belongs to another model."
        )
        raise CheckpointError(msg)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class MultiTaskConversion:
    """What was made of an upstream multi-task folder."""

    output: Path
    task_labels: dict[str, list[str]]
    n_tensors: int
    """Tensors taken over, every one compared after the folder was opened again."""


def convert_multi_task(
    source: str | Path, output: str | Path, *, tokenizer: GeneformerTokenizer, label_mappings: str | Path | None = None, overwrite: bool = False
) -> MultiTaskConversion:
    """Turn a multi-task model of upstream's `MTLClassifier` into a folder that opens with the Auto classes.

    Heads read the pooled hidden states as they are, and attention pooling weighs special tokens as well, as upstream computes it; pads it leaves out,
    which upstream does not, so its numbers are those of upstream for cells without pads.

    Args:
        source (`str` or `Path`): folder with `pytorch_model.bin`, `config.json` and `hyperparameters.json` (`GeneformerMultiTask/`).
        output (`str` or `Path`): new folder.
        tokenizer (`GeneformerTokenizer`): of the vocabulary the model was trained with.
        label_mappings (`str` or `Path`, *optional*): `task_label_mappings.pkl`; looked for in the folder and above it.

    Raises:
        CheckpointError: if a file is missing, or weights and labels do not fit each other.
        UnsafePickleError, OutputExistsError
    """
    folder = Path(source)
    missing = [name for name in MULTI_TASK_FILES if not (folder / name).is_file()]
    if missing:
        msg = f"{folder} lacks {', '.join(missing)}, so it is no multi-task model of upstream's MTLClassifier."
        raise CheckpointError(msg)
    weights = source_tensors(folder)
    labels = _labels_of(folder, label_mappings)
    hyperparameters = read_json_object(folder / "hyperparameters.json", error=CheckpointError)
    read_json_object(folder / "config.json", error=CheckpointError)
    heads = {int(head.group(1)): len(tensor) for name, tensor in weights.items() if (head := HEAD.fullmatch(name)) and head.group(2) == "weight"}
    sizes = [heads[number] for number in sorted(heads)]
    if sizes != [len(names) for names in labels.values()]:
        msg = f"{folder} has heads of {sizes} classes, and the labels are {', '.join(f'{task} ({len(names)})' for task, names in labels.items())}. They belong to another model."
        raise CheckpointError(msg)
    has_attention = any(name.startswith("attention_pool.") for name in weights)
    config = GeneformerConfig.from_pretrained(
        folder, task_labels=dict(sorted(labels.items())), pooling="attention_all" if has_attention else "first", pooler=False, vocabulary_fingerprint=tokenizer.gene_table.fingerprint,
        architectures=["GeneformerForMultiTaskClassification"], classifier_dropout=hyperparameters.get("dropout_rate"), cls_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if config.vocab_size != len(tokenizer):
        msg = (
            f"{folder} has a vocabulary of {config.vocab_size:,} and the tokenizer one of {len(tokenizer):,}. Give that of the checkpoint it was trained from."
        )
        raise SettingError(msg)
    ours = _renamed(weights, list(labels), sorted(labels))
    model = GeneformerForMultiTaskClassification(config)
    expected = model.state_dict()
    unfit = [
        *(f"{name} is missing" for name in expected if name not in ours),
        *(f"{name} is unknown" for name in ours if name not in expected),
        *(f"{name} has shape {tuple(ours[name].shape)} for {tuple(tensor.shape)}" for name, tensor in expected.items() if name in ours and ours[name].shape != tensor.shape),
    ]  # fmt: skip
    if unfit:
        msg = f"{folder}: the weights do not fit a multi-task model of its config.json: {', '.join(unfit[:5])}{f' and {len(unfit) - 5} more' if unfit[5:] else ''}."
        raise CheckpointError(msg)
    model.load_state_dict(ours)
    with new_folder(output, made_by="convert", of=str(Path(folder).resolve()), overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        again = GeneformerForMultiTaskClassification.from_pretrained(partial).state_dict()
        for name, tensor in ours.items():
            if not torch.equal(again[name], tensor):
                msg = f"{folder}: {name} differs from the source after the conversion. Nothing was written; please report this."
                raise CheckpointError(msg)
    return MultiTaskConversion(Path(output), dict(config.task_labels or {}), len(ours))


def _labels_of(folder: Path, given: str | Path | None) -> dict[str, list[str]]:
    """Return the classes of each task, in the order of its outputs, tasks in the order of the heads."""
    places = [Path(given)] if given is not None else [place / LABEL_MAPPINGS for place in (folder, *folder.absolute().parents[:2])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        msg = f"no {LABEL_MAPPINGS} beside or above {folder}: it names the classes of the heads. Give it with label_mappings=."
        raise CheckpointError(msg)
    mappings = read_label_mappings(path)
    return {task: [name for name, _ in sorted(of_task.items(), key=lambda item: item[1])] for task, of_task in mappings.items()}


def _renamed(weights: Mapping[str, torch.Tensor], given: list[str], stored: list[str]) -> dict[str, torch.Tensor]:
    """Return upstream's tensors under our names; heads are in sorted order here."""
    out: dict[str, Any] = {}
    for name, tensor in weights.items():
        if name.startswith("bert.pooler.") or name.endswith("position_ids"):
            # Neither is read by upstream's heads.
            continue
        head = HEAD.fullmatch(name)
        if head and int(head.group(1)) < len(given):
            out[f"classifiers.{stored.index(given[int(head.group(1))])}.{head.group(2)}"] = tensor
        elif name == "attention_pool.attention_weights":
            out["attention_pool.weigh.weight"] = tensor.reshape(1, -1)
        else:
            out[name] = tensor
    return out
