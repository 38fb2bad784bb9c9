from pathlib import Path

import pytest
import yaml

from geneformer_hf import CHECKPOINTS
from geneformer_hf.hub.conversion import published_card

CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_card_of_a_checkpoint_is_what_convert_writes(name):
    assert (CARDS / f"{name}.md").read_text() == published_card(name)


def test_there_are_no_cards_of_nothing():
    assert {p.stem for p in CARDS.glob("*.md")} == set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_metadata_is_yaml_the_hub_reads(name):
    _, front, body = (CARDS / f"{name}.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0"
    assert "geneformer" in metadata["tags"]
    assert "unpinned" in body
