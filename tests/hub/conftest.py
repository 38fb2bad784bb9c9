import pytest

from tests.training.conftest import base, labelled, run, settings, tokens, tune  # noqa: F401 - fixtures


@pytest.fixture
def shared_model(hub, model_folder):
    """A model folder in the repository lab/model."""
    hub.put("lab/model", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    return "lab/model"
