"""Screening: what changing each gene of a cell would do, estimated to first order, so that only the most promising genes have to be run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..models.first_order import ScanEstimate
from ..models.scan import CellScan
from .perturbation_table import ESTIMATED, kinds_of, rows_of
from .perturbations import OVEREXPRESS, Change, Screen
from .readouts import CELL, STATE

FEWEST_GENES = 4
"""Cells of fewer genes are run in whole."""
DIRECTIONS = 2
"""Directions in which a cell's own embedding is followed."""


@dataclass(frozen=True)
class Estimate:
    """What changing each gene of a cell would do, to first order."""

    readout: str
    target: str
    """A state; empty for the cell itself."""
    changes: list[Change]
    values_m: np.ndarray
    """float64 of shape `(genes,)`: what the readout would be."""

    def best(self, n: int) -> np.ndarray:
        """Return which genes move the cell most, in the order of their ranks: farthest from itself, or nearest to the state."""
        order = np.argsort(self.values_m if self.readout == CELL else -self.values_m, kind="stable")
        return np.sort(order[:n])


class CellScreener:
    """Estimates for one cell after the other.

    Args:
        model: in eval mode, on its device, with parameters that need no gradient (`frozen`).
        pooling: `"cls"` or `"mean"`.
        state_e (`torch.Tensor` of shape `(e,)`, *optional*): the state to come near to, of length 1; None to look at how far a cell is from itself.
    """

    def __init__(self, model: Any, screen: Screen, *, n_layers: int, pooling: str, target: str, state_e: torch.Tensor | None) -> None:
        self._model, self._screen, self._n_layers, self._pooling = model, screen, n_layers, pooling
        self._target, self._state_e = target, state_e

    def estimate(self, tokens: np.ndarray, first_gene: int, n_genes: int) -> Estimate | None:
        """Estimate what changing each gene does; None for a cell of very few genes."""
        if n_genes < FEWEST_GENES:
            return None
        device = next(self._model.parameters()).device
        with torch.no_grad():
            ids_l = torch.from_numpy(tokens.astype(np.int64)).to(device)
            scan = CellScan(self._model.base_model, ids_l, first_gene=first_gene, to_top=self._screen.kind == OVEREXPRESS)
        only_first = self._pooling == "cls"
        path = ScanEstimate(scan, n_genes=n_genes, n_layers=self._n_layers, anchors=self._screen.anchors, only_first=only_first)
        look = _Look(path, slice(first_gene, first_gene + n_genes), only_first)
        values = look.at_itself() if self._state_e is None else look.at_state(self._state_e)
        genes = tokens[first_gene : first_gene + n_genes]
        changes = [Change(self._screen.kind, (int(token),)) for token in genes]
        kept = np.arange(self._screen.kind == OVEREXPRESS, n_genes)
        return Estimate(CELL if self._state_e is None else STATE, self._target, [changes[i] for i in kept], values[kept])


@dataclass(frozen=True)
class _Look:
    """Readouts along the path of one cell."""

    path: ScanEstimate
    genes: slice
    only_first: bool

    def at_state(self, state_e: torch.Tensor) -> np.ndarray:
        """Return how much nearer to a state each change brings the cell."""

        def readout(hidden_xe: torch.Tensor, weight_x: torch.Tensor) -> torch.Tensor:
            if self.only_first:
                own_e = hidden_xe[0]
            else:
                # Genes, and behind all tokens those that came to the top.
                counted = torch.cat([torch.arange(self.genes.start, self.genes.stop), torch.arange(self.path.length, len(hidden_xe))]).to(hidden_xe.device)
                own_e = weight_x[counted] @ hidden_xe[counted] / weight_x[counted].sum()
            return (F.normalize(own_e.float(), dim=0) @ state_e)[None]

        with torch.no_grad():
            exact = np.array([float(readout(hidden, hidden.new_ones(len(hidden)))) for hidden in self.path.anchor_states])
            original = self.path.original_states
            before = float(readout(original, original.new_ones(len(original))))
        return self.path.slopes(readout)[0].values(self.path.places, exact) - before

    def at_itself(self) -> np.ndarray:
        """Return how like itself the cell stays.

        Likeness has no slope where nothing has changed. So the cell is followed along the few directions in which the path leads it, which are linear
        readouts, and its likeness is made up of how far it goes in each.
        """
        looked_at = slice(0, 1) if self.only_first else self.genes
        before_xe = F.normalize(self.path.original_states[looked_at].float(), dim=1)

        def way(hidden_xe: torch.Tensor) -> torch.Tensor:
            return (F.normalize(hidden_xe[looked_at].float(), dim=1) - before_xe) / len(before_xe) ** 0.5

        ways_ad = torch.stack([way(hidden).flatten() for hidden in self.path.anchor_states])
        directions_kd = torch.linalg.svd(ways_ad.cpu(), full_matrices=False).Vh[:DIRECTIONS].to(ways_ad.device)
        directions_kxe = directions_kd.unflatten(1, before_xe.shape)

        def readouts(hidden_xe: torch.Tensor, weight_x: torch.Tensor) -> torch.Tensor:
            weight_x1 = 1.0 if self.only_first else weight_x[looked_at, None]
            return (directions_kxe * (way(hidden_xe) * weight_x1)).sum((1, 2))

        gone_ak = (ways_ad @ directions_kd.T).cpu().double().numpy()
        rest_a = (ways_ad.cpu().double().square().sum(1).numpy() - (gone_ak**2).sum(1)) / 2
        slopes = self.path.slopes(readouts)
        gone_km = np.stack([slope.values(self.path.places, gone_a) for slope, gone_a in zip(slopes, gone_ak.T, strict=True)])
        between = np.arange(gone_km.shape[1]) + 0.5
        return 1 - (gone_km**2).sum(0) / 2 - np.interp(between, self.path.places, rest_a)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Have no gradients computed for parameters, which would hold on to all that goes through them."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class ScreeningQuality:
    """How well estimates rank the genes of cells that were run in whole."""

    n_cells: int
    spearman: float
    """Rank correlation of estimate and exact value, mean over cells."""
    recall: float
    """Share of the exact `top` genes among the estimated ones, mean over cells."""
    top: int

    def describe(self) -> str:
        """Say it in a sentence."""
        return (
            f"estimates against exact values of all genes of {self.n_cells:,} cells: rank correlation {self.spearman:.2f}, "
            f"{self.recall:.0%} of the exact top {self.top} are among the estimated top {self.top}"
        )


def screening_quality(table: Any, *, top: int = 50) -> ScreeningQuality | None:
    """Hold the estimates of a screening against the exact values of the cells that were run in whole.

    Args:
        table: of a run with `Perturbation.screen`, or its file.
        top: as many as were asked for.

    Returns:
        `ScreeningQuality`, or None if no cell was run in whole.
    """
    kinds = kinds_of(table)
    of_estimates = [kind for kind in kinds if kind[0].startswith(ESTIMATED)]
    if not of_estimates or (of_estimates[0][0].removeprefix(ESTIMATED), of_estimates[0][1]) not in kinds:
        return None
    readout, target = of_estimates[0][0].removeprefix(ESTIMATED), of_estimates[0][1]
    estimated, exact = rows_of(table, ESTIMATED + readout, target), rows_of(table, readout, target, chosen=True)
    keys = ["cell_id", "gene"]
    estimated, exact = (part.assign(gene=part.genes.str[0])[[*keys, "value"]] for part in (estimated, exact))
    pairs = estimated.merge(exact, on=keys, how="left", suffixes=("_estimated", "_exact"))
    whole = [cell for _, cell in pairs.groupby("cell_id", sort=False) if cell.value_exact.notna().all() and len(cell) > 1]
    if not whole:
        return None
    sign = 1 if readout == CELL else -1
    shares = []
    for cell in whole:
        n = min(top, len(cell))
        first, second = (set(cell.gene.iloc[np.argsort(sign * cell[name].to_numpy(), kind="stable")[:n]]) for name in ("value_estimated", "value_exact"))
        shares.append(len(first & second) / n)
    rho = [cell.value_estimated.corr(cell.value_exact, method="spearman") for cell in whole]
    return ScreeningQuality(len(whole), float(np.nanmean(rho)), float(np.mean(shares)), top)
