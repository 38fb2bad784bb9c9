"""Cards of tokenized datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from ..errors import CheckpointError
from ..escaping import code, markdown
from ..input_files import load_yaml
from ..models.checkpoints import TAGS

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
MOST_FILES = 50


def card(metadata: ModelCardData | DatasetCardData, body: str) -> str:
    """Return a card: the metadata as the Hub reads it, and the text below."""
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def dataset_card(splits: Mapping[str, Any], report: Mapping[str, Any], *, name: str, text: str | None = None, as_parquet: bool = False) -> str:
    """Return the card of a tokenized dataset: what it was made from, with what vocabulary, and the metadata by which the Hub serves it.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): by name.
        report (`Mapping`): what `load_cells` recorded, empty where it did not.
        name (`str`): heading.
        as_parquet (`bool`, *optional*, defaults to `False`): the tables lie where `push` puts them.
        text (`str`, *optional*): a card that somebody wrote; its text is kept, and its metadata where they do not say how the files lie.
    """
    n = sum(len(split) for split in splits.values())
    own, body = parts_of(text or "")
    said: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"} for split in splits]}] if as_parquet else None,
        # datasets.load_dataset hands this on as `info.description`: there the record of the vocabulary is looked for.
        "dataset_info": {"description": json.dumps(_in_short(report))} if report else None,
    }
    metadata = DatasetCardData(**({"tags": TAGS, "size_categories": [_size(n)]} | own | {key: value for key, value in said.items() if value}))
    return card(metadata, body if body.strip() else _text(splits, report, name, n))


def report_in_card(text: str) -> dict[str, Any]:
    """Return the record of the vocabulary that a dataset card carries, empty where there is none."""
    metadata, _ = parts_of(text)
    info = metadata.get("dataset_info")
    try:
        report = json.loads(info.get("description") or "{}") if isinstance(info, dict) else {}
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}


def without_folders(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report in which files are names: where they lie is nobody else's business."""
    return {
        key: [one | {"file": Path(one["file"]).name} if isinstance(one, dict) and "file" in one else one for one in value] if isinstance(value, list) else value
        for key, value in report.items()
    }


def parts_of(text: str) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a card."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}, text
    try:
        found = load_yaml(parts[1], "the metadata of the card", error=CheckpointError)
    except CheckpointError as error:
        msg = f"the metadata of the card are damaged ({error}). Mend README.md."
        raise CheckpointError(msg) from error
    return (found if isinstance(found, dict) else {}), parts[2]


def _in_short(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if not isinstance(value, list)} | {"n_files": len(report.get("files", []))}


def _size(n: int) -> str:
    return next((name for most, name in SIZES if n < most), "1B<n<10B")


def _text(splits: Mapping[str, Any], report: Mapping[str, Any], name: str, n: int) -> str:
    first = next(iter(splits.values()))
    vocabulary = str(report.get("encoding", "")).split("-")
    lines = [
        f"# {markdown(name)}",
        "",
        f"{n:,} single cells as ranked genes: tokens of a Geneformer, made from raw counts with geneformer_hf.",
        "",
        "| split | cells |",
        "|---|---|",
        *(f"| {markdown(split)} | {len(dataset):,} |" for split, dataset in splits.items()),
        "",
        f"Columns: {', '.join(map(code, first.column_names))}. `input_ids` are token ids, the highest rank first.",
    ]
    if len(vocabulary) == 5:
        lines += [
            "",
            f"Gene table {code(vocabulary[1])}, at most {int(vocabulary[2]):,} tokens a cell. Only models of this vocabulary can read it; geneformer_hf compares them.",
        ]
    else:
        lines += ["", "The vocabulary was not recorded."]
    files = report.get("files", [])
    if files:
        lines += ["", "## Source", "", "| file | cells | left out by filter_pass | counts | genes |", "|---|---|---|---|---|"]
        lines += [
            f"| {markdown(one['file'])} | {one['cells']:,} | {one['filter_pass']:,} | {markdown(one['counts'])} | {markdown(one['genes'])} |"
            for one in files[:MOST_FILES]
        ]
        lines += [f"\n… and {len(files) - MOST_FILES:,} more: `report.json`."] if len(files) > MOST_FILES else []
        lines += [
            "",
            f"Cells without a gene of the vocabulary, left out: {report.get('left_out_without_genes', 0):,}. Skipped files: {len(report.get('skipped_files', [])):,}.",
        ]
    lines += [
        "", "## Use", "", "```python", "import datasets, geneformer_hf", "", 'cells = datasets.load_dataset("REPOSITORY", split="' + next(iter(splits)) + '")',
        'embeddings = geneformer_hf.embed_cells("MODEL", cells)', "```", "", "State the licence and the origin of the cells before you share them: this card cannot know them.",
    ]  # fmt: skip
    return "\n".join(lines)
