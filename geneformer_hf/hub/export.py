"""Our checkpoints in other forms: plain BERT folders for users of upstream tools, adapters merged into their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import CheckpointError
from ..input_files import read_text
from ..models.adapters import base_folders, is_adapter, is_quantized
from ..models.loading import load_model, load_peft_model, load_tokenizer
from ..models.places import local_folder
from ..outputs import new_folder, require_apart, require_free

# What BERT's configuration does not know.
_OURS = (
    "cls_token_id",
    "pooling",
    "vocabulary_fingerprint",
    "task_labels",
    "task_weights",
    "integrate",
    "integration_weight",
    "class_weights",
    "task_class_weights",
    "label_columns",
    "label_mean",
    "label_scale",
)


def export_checkpoint(model: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint as a plain `bert` folder: the published layout, without a tokenizer.

    It opens in `BertForMaskedLM` (or the classifier it is) in a process that does not know this package, which is tried
    before success is reported.

    Args:
        model (`str` or `Path`): folder or Hub id of a Geneformer checkpoint.
        output (`str` or `Path`): a new folder.

    Raises:
        CheckpointError: if the model has no BERT counterpart (multi-task models, or pooling by mean).
        OutputExistsError
    """
    folder = local_folder(model)
    require_apart(output, [folder, *base_folders(folder)])
    require_free(Path(output), overwrite=overwrite, made_by="export", of=str(folder.resolve()))
    # An adapter is merged on the way; BERT knows none.
    loaded = merged_model(model) if is_adapter(folder) else load_model(model)
    name = type(loaded).__name__.replace("Geneformer", "Bert", 1)
    plain_class = getattr(transformers, name, None)
    if plain_class is None or (name == "BertForSequenceClassification" and loaded.config.pooling in ("mean", "attention")):
        msg = f"{model}: {type(loaded).__name__} with pooling {loaded.config.pooling!r} has no counterpart among BERT's models, so no plain export."
        raise CheckpointError(msg)
    if loaded.config.label_scale is not None:
        msg = f"{model} predicts numbers in units of their own (label_mean, label_scale), which BERT's models do not know, so no plain export."
        raise CheckpointError(msg)
    if is_quantized(loaded):
        msg = f"{model} was saved quantised. Export the checkpoint it was made from."
        raise CheckpointError(msg)
    with new_folder(output, made_by="export", of=str(folder.resolve()), overwrite=overwrite) as partial:
        loaded.save_pretrained(partial)
        path = partial / "config.json"
        config = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in _OURS}
        config |= {"model_type": "bert", "architectures": [name], "vocab_size": loaded.config.vocab_size, "hidden_act": loaded.config.hidden_act}
        config |= {"max_position_embeddings": loaded.config.max_position_embeddings}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        plain = plain_class.from_pretrained(partial)
        ours, theirs = loaded.state_dict(), plain.state_dict()
        different = [k for k in ours if k not in theirs or not torch.equal(ours[k], theirs[k])]
        if different or len(ours) != len(theirs):
            msg = (
                f"{output}: {len(different)} tensors differ after the export, for instance {', '.join(different[:3])}. Nothing was written; please report this."
            )
            raise CheckpointError(msg)
    return Path(output)


def merged_model(adapter: str | Path, *, base: str | Path | None = None) -> Any:
    """Return the model that an adapter makes of its base, as a plain model without an adapter.

    The update is added to the base's own weights, also where it was trained on quantised ones; logits then differ by the error of the
    quantisation.
    """
    merged = load_peft_model(adapter, base=base, quantization="none").merge_and_unload()
    merged.config.name_or_path = str(adapter)
    return merged


def merge_adapter(adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write the model that an adapter makes of its base as a checkpoint of its own, with the tokenizer.

    Args:
        adapter (`str` or `Path`): folder or Hub id of an adapter.
        output (`str` or `Path`): a new folder.
        base (*optional*): where the base is now, if it has moved.

    Raises:
        CheckpointError: if this is no adapter, or its base is not there.
        OutputExistsError
    """
    folder = local_folder(adapter)
    if not is_adapter(folder):
        msg = f"{adapter} is no adapter (it holds no adapter_config.json), so there is nothing to merge."
        raise CheckpointError(msg)
    require_apart(output, [folder, base, *base_folders(folder)])
    require_free(Path(output), overwrite=overwrite, made_by="export", of=str(folder.resolve()))
    with new_folder(output, made_by="export", of=str(folder.resolve()), overwrite=overwrite) as partial:
        merged_model(adapter, base=base).save_pretrained(partial)
        load_tokenizer(adapter).save_pretrained(partial)
        card = folder / "README.md"
        if card.is_file():
            (partial / "README.md").write_text(
                read_text(card, error=CheckpointError).replace("library_name: peft", "library_name: transformers"), encoding="utf-8"
            )
    return Path(output)
