"""Our checkpoints as plain BERT folders, for users of upstream tools."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from ..errors import CheckpointError
from ..models.loading import load_model
from ..outputs import new_folder

# What BERT's configuration does not know.
_OURS = ("cls_token_id", "pooling", "vocabulary_fingerprint", "task_labels", "task_weights")


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
    loaded = load_model(model)
    name = type(loaded).__name__.replace("Geneformer", "Bert", 1)
    plain_class = getattr(transformers, name, None)
    if plain_class is None or (name == "BertForSequenceClassification" and loaded.config.pooling == "mean"):
        msg = f"{model}: {type(loaded).__name__} with pooling {loaded.config.pooling!r} has no counterpart among BERT's models, so no plain export."
        raise CheckpointError(msg)
    with new_folder(output, overwrite=overwrite) as partial:
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
