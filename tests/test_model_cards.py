"""Cards of published checkpoints, and of runs: every number in them is known from somewhere."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from geneformer_hf import CHECKPOINTS, GeneformerConfig
from geneformer_hf.hub.conversion import published_card
from geneformer_hf.reports.cards import versions
from geneformer_hf.reports.published import CITATIONS, FACTS
from tests.training.conftest import base, labelled, run, settings, tokens, tune  # noqa: F401 - fixtures

CARDS = Path(__file__).parents[1] / "model_cards"
# Of the template itself: counts per 10,000, the study of zero-shot embeddings, the licence.
SAID_OF_ALL = {"10,000", "2025", "26", "101", "2.0"}


def numbers(text):
    return {word.rstrip(".,") for word in re.findall(r"(?<![\w.-])\d[\d,.]*", text)}


def n_parameters(c):
    """Count the weights of a BERT with a tied masked-token head, on paper."""
    h, f = c.hidden_size, c.intermediate_size
    embeddings = (c.vocab_size + c.max_position_embeddings + c.type_vocab_size + 2) * h
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 4 * h
    return embeddings + c.num_hidden_layers * layer + (h * h + h) + 2 * h + c.vocab_size


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_card_of_a_checkpoint_is_what_convert_writes(name):
    assert (CARDS / f"{name}.md").read_text() == published_card(name)


def test_there_are_no_cards_of_nothing():
    assert {p.stem for p in CARDS.glob("*.md")} - {"README"} == set(CHECKPOINTS) == set(FACTS)
    linked = re.findall(r"\]\((\S+)\.md\)", (CARDS / "README.md").read_text())
    assert set(linked) == set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_metadata_is_what_the_hub_reads(name):
    found = ModelCard.load(CARDS / f"{name}.md").data
    expected = {"license": "apache-2.0", "library_name": "transformers", "base_model": CHECKPOINTS[name].repository, "pipeline_tag": "fill-mask"}
    assert {key: found.get(key) for key in expected} == expected
    assert "geneformer" in found.tags
    corpus = re.search(r"Genecorpus-\d+M", FACTS[name].corpus)
    assert [dataset.split("/")[1] for dataset in found.datasets or []] == ([corpus[0]] if corpus else [])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_number_of_a_card_is_known(name):
    card = ModelCard.load(CARDS / f"{name}.md")
    config, known, facts = GeneformerConfig.from_preset(name), CHECKPOINTS[name], FACTS[name]
    n_special = 4 if known.version == "V2" else 2
    shape = [
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size, config.max_position_embeddings, config.vocab_size,
        config.vocab_size - n_special, *range(n_special), n_parameters(config),
    ]  # fmt: skip
    said = [
        known.name,
        known.subfolder,
        known.revision or "",
        facts.use,
        facts.corpus,
        facts.weights_sha256 or "",
        facts.revision_source or "",
        facts.same_as or "",
    ]
    said += [text for figure in facts.figures for text in (figure.what, figure.value, figure.source)] + list(facts.limitations)
    said += [CITATIONS[key] for key in facts.citations]
    allowed = SAID_OF_ALL | {f"{number:,}" for number in shape} | numbers(" ".join(said))
    assert numbers(card.text) <= allowed
    # And what a reader looks for is there.
    for text in (
        f"{n_parameters(config):,}",
        f"{config.vocab_size:,}",
        known.revision or "unpinned",
        facts.corpus,
        *(figure.value for figure in facts.figures),
    ):
        assert text in card.text
    assert "not an official release" in card.text


def test_cancer_tuned_and_base_say_what_they_are_for():
    for name, facts in FACTS.items():
        assert ("tumour-restricting" in facts.use) == name.endswith("CLcancer")
        assert ("not from tumours" in facts.use) != name.endswith("CLcancer")
        assert ("14 million" in facts.corpus) == name.endswith("CLcancer")


def test_the_card_of_a_fine_tuned_model_says_what_the_run_found(tune):  # noqa: F811
    folder = tune(group_column="donor", baselines=True).folder
    figures, card = json.loads((folder / "figures.json").read_text()), ModelCard.load(folder / "README.md")
    (results,) = card.data.to_dict()["model-index"]
    (result,) = results["results"]
    mine = figures["heads"]["cell_type"]["this model"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {m["type"]: round(mine[m["type"]], 4) for m in result["metrics"]}
    assert len(result["metrics"]) >= 5
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.M)
    names = [key.strip().replace(" ", "_") for key in dict(rows)["cell_type"].split("|")]
    for name, found in figures["heads"]["cell_type"].items():
        assert [cell.strip() for cell in dict(rows)[name].split("|")] == [f"{found[key]:.3f}" for key in names]
    assert len(figures["heads"]["cell_type"]) > 3
    assert f"{figures['n_train']:,} cells to train on, {figures['n_test']:,} to test" in card.text
    assert all(f"{name} {version}" in card.text for name, version in versions().items())
    assert "Every donor is wholly on one side." in card.text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.S)[1])
    assert recipe["group_column"] == "donor"


def test_the_card_of_a_pretrained_model_says_what_the_run_found(run):  # noqa: F811
    found = run(num_train_epochs=1)
    figures, card = json.loads((found.folder / "figures.json").read_text()), ModelCard.load(found.folder / "README.md")
    (held_out,) = figures["held_out"].values()
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {m["type"]: round(held_out["after"][m["type"]], 4) for m in result["metrics"]}
    assert {"loss", "loss_at_mask", "perplexity"} <= {m["type"] for m in result["metrics"]}
    line = next(line for line in card.text.splitlines() if "| `<mask>` |" in line)
    shown = [cell.strip() for cell in line.split("|")[3:-1]]
    after, baselines = held_out["after"], held_out["baselines"]
    assert shown[2:] == [f"{value:.3f}" for value in (after["loss_at_mask"], after["accuracy_top1_at_mask"], after["accuracy_top10_at_mask"], baselines["gene_frequency_at_mask"], baselines["rank_frequency_at_mask"])]  # fmt: skip
    assert f"{figures['steps']:,} optimiser steps" in card.text
    assert "seed 42" in card.text
