"""In silico perturbations: what is changed in the ranking of a cell's genes, and which genes stand where afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..errors import SettingError

DELETE, OVEREXPRESS, INHIBIT, ACTIVATE = KINDS = ("delete", "overexpress", "inhibit", "activate")
SHIFTS = (INHIBIT, ACTIVATE)


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One in silico change, applied to every cell in which it can be made.

    Deleting, inhibiting and activating need all genes to be expressed; overexpressing puts those that are not at the top as well.

    Example:
        >>> Perturbation(kind="delete", genes=("ENSG00000136997",))
        Perturbation(kind='delete', genes=('ENSG00000136997',), quartiles=None, rank=None)
        >>> [p.genes for p in Perturbation.each("overexpress", ["ENSG00000136997", "ENSG00000141510"])]
        [('ENSG00000136997',), ('ENSG00000141510',)]
    """

    kind: str
    """`delete` removes the genes; `overexpress` moves them to the top, in the order given; `inhibit` and `activate` shift their rank down or up."""
    genes: tuple[str, ...]
    """Ensembl ids, changed together."""
    quartiles: int | None = None
    """Of `inhibit` and `activate`: by how many quarters of the cell's genes a rank is shifted, 1 to 3; 1 if `rank` is not given either."""
    rank: int | None = None
    """Of `inhibit` and `activate`: the rank the genes are moved to, 0 being the top; genes beyond it already stay where they are."""

    def __post_init__(self) -> None:
        wrong = []
        if self.kind not in KINDS:
            wrong.append(f"kind is {self.kind!r}; expected {', '.join(KINDS)}")
        if not self.genes:
            wrong.append("there are no genes; for one change per gene use Perturbation.each(kind, genes)")
        if isinstance(self.genes, str):
            wrong.append(f"genes is the text {self.genes!r}; expected a tuple of Ensembl ids")
        elif len(set(self.genes)) != len(self.genes):
            wrong.append(f"genes are named twice: {', '.join(sorted({g for g in self.genes if list(self.genes).count(g) > 1}))}")
        if self.kind not in SHIFTS and (self.quartiles is not None or self.rank is not None):
            wrong.append(f"quartiles and rank are for inhibit and activate, and kind is {self.kind}")
        if self.quartiles is not None and self.rank is not None:
            wrong.append("give quartiles or rank, not both")
        if self.quartiles not in (None, 1, 2, 3):
            wrong.append(f"quartiles is {self.quartiles!r}; expected 1, 2 or 3")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 0):
            wrong.append(f"rank is {self.rank!r}; expected a whole number, 0 for the top")
        if wrong:
            msg = f"The perturbation cannot be used: {'; '.join(wrong)}."
            raise SettingError(msg)
        if self.kind in SHIFTS and self.rank is None and self.quartiles is None:
            object.__setattr__(self, "quartiles", 1)

    @classmethod
    def each(cls, kind: str, genes: Sequence[str], **shift: int | None) -> list[Perturbation]:
        """Return one perturbation for each gene."""
        return [cls(kind=kind, genes=(gene,), **shift) for gene in genes]

    @classmethod
    def every(cls, kind: str, **shift: int | None) -> EveryGene:
        """Return each gene of a cell by itself, in every cell: a scan."""
        return EveryGene(kind=kind, **shift)

    @classmethod
    def screen(cls, kind: str, *, top: int = 50, towards: str | None = None, judged: int | None = None, anchors: int = 4) -> Screen:
        """Return each gene of a cell by itself, estimated for all and run for the most promising ones."""
        return Screen(kind=kind, top=top, towards=towards, judged=judged, anchors=anchors)

    @classmethod
    def pairs(cls, kind: str, genes: Sequence[str], **shift: int | None) -> list[Perturbation]:
        """Return one for each gene and one for each pair of genes, so that a pair can be held against the sum of its genes."""
        return [*cls.each(kind, genes, **shift), *(cls(kind=kind, genes=pair, **shift) for pair in combinations(genes, 2))]

    @classmethod
    def with_anchor(cls, kind: str, anchor: str, genes: Sequence[str], **shift: int | None) -> list[Perturbation]:
        """Return the anchor, each gene, and the anchor with each gene."""
        others = [gene for gene in genes if gene != anchor]
        return [*cls.each(kind, [anchor, *others], **shift), *(cls(kind=kind, genes=(anchor, gene), **shift) for gene in others)]


@dataclass(frozen=True)
class Change:
    """A perturbation in the ids of a vocabulary."""

    kind: str
    tokens: tuple[int, ...]
    quartiles: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class ChangedCell:
    """The genes of a cell after a change, beside those before."""

    tokens: np.ndarray
    """int64 of shape `(m',)`: gene tokens by rank, special ones left out."""
    origin: np.ndarray
    """int64 of shape `(m',)`: at which rank each stood before; -1 for a gene that was not expressed."""
    untouched: np.ndarray
    """bool of shape `(m',)`: genes that the change is not about."""
    n_lost: int = 0
    """Genes of lowest rank that fell off the end, which the cell before the change is looked at without as well."""


def changed(genes: np.ndarray, change: Change, *, most: int) -> ChangedCell | None:
    """Apply a change to a cell.

    Args:
        genes (int of shape `(m,)`): gene tokens by rank.
        most: genes that the model takes.

    Returns:
        `ChangedCell`, or None where the change cannot be made, or changes nothing: genes that are not expressed, a gene that is at the top already, a cell
        of which nothing would be left.
    """
    ranks = [int(found[0]) if len(found := np.flatnonzero(genes == token)) else -1 for token in change.tokens]
    if change.kind != OVEREXPRESS and min(ranks) < 0:
        return None
    others = np.ones(len(genes), dtype=bool)
    others[[rank for rank in ranks if rank >= 0]] = False
    rest = np.flatnonzero(others)
    if change.kind == DELETE:
        origin = rest
    elif change.kind == OVEREXPRESS:
        origin = np.concatenate([np.array(ranks, dtype=np.int64), rest])
    else:
        origin = _shifted(len(genes), sorted(ranks), rest, change)
    lost = max(len(origin) - most, 0)
    origin = origin[: len(origin) - lost]
    if not len(origin) or (len(origin) == len(genes) and (origin == np.arange(len(genes))).all()):
        return None
    tokens = np.where(origin >= 0, genes[origin], 0).astype(np.int64)
    if (origin < 0).any():
        tokens[: len(change.tokens)] = change.tokens
    return ChangedCell(tokens, origin, (origin >= 0) & others[origin], lost)


def _shifted(n: int, ranks: list[int], rest: np.ndarray, change: Change) -> np.ndarray:
    """Return the order of ranks after those of some genes were moved; genes moved to one rank keep their order."""
    down = change.kind == INHIBIT
    if change.rank is None:
        step = round((change.quartiles or 1) * n / 4)
        wanted = [rank + step if down else rank - step for rank in ranks]
    else:
        wanted = [max(rank, change.rank) if down else min(rank, change.rank) for rank in ranks]
    wanted = [min(max(target, 0), n - 1) for target in wanted]
    order = np.full(n, -1, dtype=np.int64)
    taken: set[int] = set()
    # From the end that they are moved to, so that several fit beside each other.
    for target, rank in sorted(zip(wanted, ranks, strict=True), key=lambda pair: (pair[0], pair[1]), reverse=down):
        step_aside = -1 if down else 1
        while target in taken:
            target += step_aside  # noqa: PLW2901
        taken.add(target)
        order[target] = rank
    order[order < 0] = rest
    return order


@dataclass(frozen=True, kw_only=True)
class EveryGene:
    """Each gene of a cell by itself, in every cell: a scan."""

    kind: str
    quartiles: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        # The checks of one perturbation; a gene is not at hand yet.
        checked = Perturbation(kind=self.kind, genes=("any",), quartiles=self.quartiles, rank=self.rank)
        object.__setattr__(self, "quartiles", checked.quartiles)

    def of(self, genes: np.ndarray) -> list[Change]:
        """Return the changes of a cell with these gene tokens."""
        return [Change(self.kind, (int(token),), self.quartiles, self.rank) for token in genes]


@dataclass(frozen=True, kw_only=True)
class Screen(EveryGene):
    """Each gene of a cell by itself: what it does is estimated for all, and computed for those that do most by that estimate.

    Raises:
        SettingError: for changes other than deleting and overexpressing.
    """

    top: int = 50
    """Genes of each cell that are run."""
    towards: str | None = None
    """The state to which genes are to bring the cell; None: the goal where states are asked for, else the genes that change the cell most."""
    judged: int | None = None
    """Cells of which all genes are run, so that the estimates can be judged; None: one in twenty, 50 at most."""
    anchors: int = 4
    """Exact passes for each cell that the estimates lean on: more are better and slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = []
        if self.kind not in (DELETE, OVEREXPRESS):
            wrong.append(f"kind is {self.kind!r}; estimates are for delete and overexpress")
        if self.top < 1:
            wrong.append(f"top is {self.top}; expected 1 or more")
        if self.anchors < 2:
            wrong.append(f"anchors is {self.anchors}; expected 2 or more")
        if self.judged is not None and self.judged < 0:
            wrong.append(f"judged is {self.judged}; expected 0 or more")
        if wrong:
            msg = f"The screening cannot be run: {'; '.join(wrong)}."
            raise SettingError(msg)

    def judged_rows(self, rows: np.ndarray) -> frozenset[int]:
        """Return which of some cells are run in whole, spread evenly over them."""
        n = min(len(rows), min(50, -(-len(rows) // 20)) if self.judged is None else self.judged)
        return frozenset(rows[np.linspace(0, len(rows) - 1, n).round().astype(int)].tolist()) if n else frozenset()
