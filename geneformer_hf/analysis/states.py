"""States that perturbations are to lead to: the mean embedding of the cells in each, and what they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CellFileError, SettingError
from ..input_files import read_json
from ..models.loading import fingerprint_of
from ..outputs import new_file
from .embeddings import state_embeddings


@dataclass(frozen=True, kw_only=True)
class StateShift:
    """From which state to which: cells of `start` are perturbed, and how far they move towards the others is read.

    Example:
        >>> StateShift(column="cell_type", start="B", goal="NK", alternatives=("Monocyte",)).targets
        ('B', 'NK', 'Monocyte')
    """

    column: str
    """Column of obs that says which state a cell is in."""
    start: str
    goal: str
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.start == self.goal:
            msg = f"start and goal are both {self.goal!r}; expected two states."
            raise SettingError(msg)
        twice = {self.start, self.goal} & set(self.alternatives)
        if twice or len(set(self.alternatives)) != len(self.alternatives):
            msg = f"alternatives name a state twice, or start or goal: {', '.join(self.alternatives)}. Expected other states."
            raise SettingError(msg)

    @property
    def targets(self) -> tuple[str, ...]:
        """All states whose nearness is read."""
        return (self.start, self.goal, *self.alternatives)

    def require_in(self, values: Sequence[Any]) -> None:
        """Raise unless some cells are in each of the states.

        Raises:
            SettingError
        """
        found = {str(value) for value in values if value is not None}
        missing = [state for state in self.targets if state not in found]
        if missing:
            msg = f"column {self.column!r} has no cell in {', '.join(map(repr, missing))}. Found: {', '.join(sorted(found)[:20]) or 'nothing'}."
            raise SettingError(msg)


@dataclass(frozen=True)
class StateVectors:
    """Mean embeddings of states, with the model, layer and pooling they belong to."""

    vectors: dict[str, np.ndarray]
    """float64 of shape `(e,)` each."""
    model: str
    """`fingerprint_of` it."""
    layer: int
    """Layers run: the index into `hidden_states`, from the first."""
    pooling: str

    @classmethod
    def of(cls, model: Any, cells: Any, column: str, *, n_layers: int, pooling: str, **options: Any) -> StateVectors:
        """Compute the exact mean of the cells in each state."""
        return cls(state_embeddings(model, cells, column, layer=n_layers, pooling=pooling, **options), fingerprint_of(model), n_layers, pooling)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write as JSON."""
        content = {
            "model": self.model,
            "layer": self.layer,
            "pooling": self.pooling,
            "vectors": {name: vector.tolist() for name, vector in self.vectors.items()},
        }
        with new_file(path, overwrite=overwrite) as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> StateVectors:
        """Read what `save` wrote.

        Raises:
            CellFileError
        """
        try:
            content = read_json(Path(path))
            vectors = {str(name): np.array(vector, dtype=np.float64) for name, vector in content["vectors"].items()}
            return cls(vectors, str(content["model"]), int(content["layer"]), str(content["pooling"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CellFileError):
                raise
            msg = f"{path} cannot be read as vectors of states ({type(error).__name__}: {error}). Write them with `StateVectors.save`."
            raise CellFileError(msg) from error

    def require_made_with(self, model: Any, *, n_layers: int, pooling: str) -> None:
        """Raise if these vectors are of another model, layer or pooling: cosines to them would mean nothing.

        Raises:
            SettingError
        """
        ours: Mapping[str, Any] = {"model": fingerprint_of(model), "layer": n_layers, "pooling": pooling}
        different = [f"{name} {getattr(self, name)} and not {value}" for name, value in ours.items() if getattr(self, name) != value]
        if different:
            msg = f"The vectors of states were made with {', '.join(different)}. Compute them with this model, layer and pooling."
            raise SettingError(msg)

    def only(self, states: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the vectors of some states, in that order.

        Raises:
            SettingError
        """
        missing = [state for state in states if state not in self.vectors]
        if missing:
            msg = f"there is no vector for state {', '.join(map(repr, missing))}. Found: {', '.join(self.vectors)}."
            raise SettingError(msg)
        return {state: self.vectors[state] for state in states}
