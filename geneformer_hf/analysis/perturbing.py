"""In silico perturbation: every change in every cell, and what it does."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..device import resolve_device, resolve_dtype
from ..errors import OutputExistsError, SettingError, VocabularyMismatchError
from ..models.configuration_geneformer import GeneformerConfig
from ..models.heads import heads_of
from ..models.loading import fingerprint_of, load_model, require_same_vocabulary, tokenizer_of
from ..models.modeling_geneformer import GeneformerForMultiTaskClassification, GeneformerForSequenceClassification
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..models.variants import ScannedCell, Variant, VariantEncoder
from ..outputs import new_part
from .cells import Cells, open_tokens
from .embeddings import resolve_layer, resolve_pooling
from .perturbation_parts import mine_of, processes, shared_parts, shared_states
from .perturbation_plan import CellDigest, PerturbationPlan, make_plan
from .perturbation_table import TableBuilder, plan_of, write_part
from .perturbations import DELETE, OVEREXPRESS, Change, ChangedCell, EveryGene, Perturbation, Screen, changed
from .readouts import CELL, GENE, PROBABILITY, STATE, Before, Reader, Shift, named_states
from .screening import CellScreener, Estimate, frozen
from .states import StateShift, StateVectors

logger = logging.getLogger(__name__)

CELLS_AT_ONCE = 32
"""Cells whose vectors before the change are held at the same time."""
PASSES_TO_ESTIMATE = 12
"""Variants that take as long as the estimates of a cell."""
FEWEST_TO_SHARE = 4
"""Variants of one cell for which sharing their first layer is worth it."""
PROBED = 8
"""Variants that are run to estimate how long a plan takes."""


@dataclass(frozen=True)
class PerturbedCell:
    """What the perturbations did to one cell."""

    row: int
    """Place of the cell among all cells."""
    cell_id: str
    n_genes: int
    changes: list[Change]
    cells: list[ChangedCell]
    shifts: list[Shift]
    estimate: Estimate | None = None
    """Of a screening: what each gene would do."""


@dataclass(frozen=True)
class _Whole:
    """A cell as it is, parted into what stands before its genes, the genes, and what stands behind them."""

    row: int
    cell_id: str
    tokens: np.ndarray
    first_gene: int
    n_genes: int

    @property
    def genes(self) -> np.ndarray:
        return self.tokens[self.first_gene : self.first_gene + self.n_genes]

    def around(self, genes: np.ndarray) -> np.ndarray:
        """Return other genes between the special tokens of this cell."""
        return np.concatenate([self.tokens[: self.first_gene], genes, self.tokens[self.first_gene + self.n_genes :]])


class InSilicoPerturber:
    """A model made ready to perturb cells.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): any Geneformer, base or fine-tuned, or its folder or Hub id.
        readout (`"cell"`, `"gene"` or `"probability"`, *optional*, defaults to `"cell"`):
            what is read of a perturbed cell: its own embedding (and how near it is to states), that of each of its other genes as well, or what a
            fine-tuned classifier says of it.
        pooling (`"cls"` or `"mean"`, *optional*): how a cell is embedded; `cls` where the vocabulary has it.
        layer (`int`, *optional*, defaults to -2): index into `hidden_states`; probabilities are read from the last layer always.
        states (`StateShift`, *optional*): cells of which state to perturb, and which states to look towards.
        vectors (`StateVectors`, *optional*): mean embeddings of the states; computed from the cells given otherwise.
        tokenizer, batch_size, device, dtype, quantization, progress: as in `embed_cells`.

    Example:
        ```python
        perturber = InSilicoPerturber("geneformer-v2")
        table = perturber.run("cells.h5ad", Perturbation.each("delete", ["ENSG00000136997", "ENSG00000141510"]))
        path = perturber.write("cells.h5ad", Perturbation.every("delete"), "deleted.parquet")
        ```
    """

    def __init__(
        self, model: Any, *, readout: str = CELL, pooling: str | None = None, layer: int = -2, states: StateShift | None = None, vectors: StateVectors | None = None,
        tokenizer: GeneformerTokenizer | None = None, batch_size: int | None = None, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
        quantization: str | None = None, base: str | None = None, allow_missing_weights: bool = False, progress: bool = True,
    ) -> None:  # fmt: skip
        if readout not in (CELL, GENE, PROBABILITY):
            msg = f"readout is {readout!r}; expected cell, gene or probability."
            raise SettingError(msg)
        if readout == PROBABILITY and states is not None:
            msg = "states are for the readouts cell and gene; a classifier is read by its classes. Leave out states, or the readout."
            raise SettingError(msg)
        self.model = load_model(model, quantization=quantization, base=base, device=device, allow_missing_weights=allow_missing_weights)
        self.config: GeneformerConfig = self.model.config
        self.readout, self.states, self.progress, self._tokenizer, self._given_vectors = readout, states, progress, tokenizer, vectors
        self.pooling = resolve_pooling(pooling, self.config)
        self.n_layers = resolve_layer(-1 if readout == PROBABILITY else layer, self.config.num_hidden_layers)
        self.device = resolve_device(device)
        self.reader = self._reader({})
        self.encoder = VariantEncoder(
            self.model, only_first=self.reader.only_first, n_layers=self.n_layers, device=self.device, dtype=resolve_dtype(dtype), batch_size=batch_size
        )

    def _reader(self, vectors: dict[str, np.ndarray]) -> Reader:
        readouts = {CELL: [CELL], GENE: [CELL, GENE], PROBABILITY: [PROBABILITY]}[self.readout] + ([STATE] if vectors else [])
        heads = []
        if self.readout == PROBABILITY:
            if not isinstance(self.model, (GeneformerForSequenceClassification, GeneformerForMultiTaskClassification)):
                msg = f"readout 'probability' needs a model fine-tuned for classes of cells, and this is a {type(self.model).__name__}. Fine-tune one, or read 'cell'."
                raise SettingError(msg)
            heads = heads_of(self.config)
        return Reader(self.config, self.pooling, readouts, named_states(vectors, self.device) if vectors else None, self.model, heads)

    @property
    def tokenizer(self) -> GeneformerTokenizer:
        """The tokenizer, checked against the model."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.model)
        require_same_vocabulary(self.config, self._tokenizer)
        return self._tokenizer

    @property
    def most_genes(self) -> int:
        """Genes the model takes beside its special tokens."""
        return int(self.config.max_position_embeddings) - sum(token is not None for token in (self.config.cls_token_id, self.config.eos_token_id))

    def changes_of(self, perturbations: Sequence[Perturbation]) -> list[Change]:
        """Return perturbations in the ids of the vocabulary.

        Raises:
            UnknownGeneError: naming every gene that the vocabulary does not have.
        """
        names = list(dict.fromkeys(gene for perturbation in perturbations for gene in perturbation.genes))
        token_of = dict(zip(names, self.tokenizer.gene_table.token_of(names).tolist(), strict=True))
        return [Change(p.kind, tuple(token_of[gene] for gene in p.genes), p.quartiles, p.rank) for p in perturbations]

    def open(self, cells: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None) -> Cells:
        """Open cells as tokens for this model."""
        tokens = open_tokens(cells, lambda: self.tokenizer, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
        tokens.require_made_for(self.config)
        return tokens

    def plan(self, cells: Any, perturbations: EveryGene | Sequence[Perturbation], *, probe: bool = True, **options: Any) -> PerturbationPlan:
        """Return what a run would do, without doing it.

        Args:
            cells, perturbations, options: as in `run`.
            probe: run a few variants to estimate the time.

        Raises:
            SettingError: if there is nothing to do, or a state has no cells.
            UnknownGeneError: naming the genes that the vocabulary does not have.
        """
        return self._plan(self.open(cells, **options), perturbations, probe=probe)

    def _plan(self, tokens: Cells, perturbations: EveryGene | Sequence[Perturbation], *, probe: bool) -> PerturbationPlan:
        wanted = perturbations if isinstance(perturbations, EveryGene) else self.changes_of(perturbations)
        if not isinstance(wanted, EveryGene) and not wanted:
            msg = "There are no perturbations. Give a list of them, or Perturbation.every('delete')."
            raise SettingError(msg)
        if isinstance(wanted, Screen):
            self._screened_towards(wanted)
        rows, identity = np.arange(tokens.n_cells), self._identity()
        if self.states is not None:
            values = tokens.column(self.states.column)
            self.states.require_in(values)
            rows = np.array([row for row, value in enumerate(values) if value is not None and str(value) == self.states.start])
            if self._given_vectors is None:
                identity["vectors"] = self._digest_of_states(tokens, values)
        if not len(rows):
            msg = "There are no cells."
            raise SettingError(msg)
        names = [] if isinstance(perturbations, EveryGene) else [f"{p.kind} {'+'.join(p.genes)}" for p in perturbations]
        cells = ((whole.row, whole.cell_id, whole.genes) for whole in self._wholes(tokens, rows))
        plan = make_plan(cells, wanted, rows=rows, readout=self.readout, n_targets=self._n_targets, identity=identity, names=names)
        return replace(plan, seconds=self._estimate(tokens, plan)) if probe else plan

    def _digest_of_states(self, tokens: Cells, values: Sequence[Any]) -> str:
        """Return the fingerprint of all cells that the vectors of the states are computed from."""
        digest, labels = CellDigest(), [str(value) for value in values]
        rows = np.array([row for row, label in enumerate(labels) if label in self.states.targets])  # type: ignore[union-attr]
        for whole in self._wholes(tokens, rows):
            digest.add(f"{labels[whole.row]}|{whole.cell_id}", whole.genes)
        return digest.hexdigest()

    @property
    def _n_targets(self) -> int:
        if self.readout == PROBABILITY:
            return sum(len(head.names) for head in self.reader.heads)
        return 0 if self.states is None else len(self.states.targets)

    def _identity(self) -> dict[str, Any]:
        """Return what the values depend on beside cells and changes."""
        states = None if self.states is None else {"column": self.states.column, "targets": list(self.states.targets)}
        given = self._given_vectors
        vectors = None if given is None else {name: vector.tolist() for name, vector in given.only(self.states.targets).items()}  # type: ignore[union-attr]
        return {
            "model": fingerprint_of(self.model), "layer": self.n_layers, "pooling": self.pooling, "readout": self.readout, "dtype": str(self.encoder.dtype),
            "states": states, "vectors": vectors,
        }  # fmt: skip

    def _estimate(self, tokens: Cells, plan: PerturbationPlan) -> float:
        """Return how many seconds a plan will take, from a few variants of a cell of middle length."""
        busy = np.flatnonzero(plan.n_variants_n)
        middle = busy[np.argsort(plan.n_genes_n[busy])[len(busy) // 2]]
        (whole,) = self._wholes(tokens, plan.rows[[middle]])
        some = [Change(DELETE, (int(token),)) for token in whole.genes[:PROBED]]
        with self.encoder.ready():
            for _ in range(2):
                # The first pass warms up.
                start = time.perf_counter()
                list(self._perturb([(whole, some)]))
                took = time.perf_counter() - start
        e, inner = self.config.hidden_size, self.config.intermediate_size
        # Multiplications for a token: what grows with the cell is attention.
        work = plan.n_genes_n * (4 * e * e + 2 * e * inner + 2 * e * plan.n_genes_n.astype(np.float64))
        one = took / max(len(some), 1) / work[middle]
        return float((work * (plan.n_variants_n + (PASSES_TO_ESTIMATE if plan.estimates else 0))).sum() * one)

    def run(
        self, cells: Any, perturbations: EveryGene | Sequence[Perturbation], *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None
    ) -> pa.Table:  # fmt: skip
        """Perturb cells, and return what it does to them.

        Args:
            cells (`AnnData`, `str`, `Path` or `datasets.Dataset`): as in `embed_cells`.
            perturbations:
                a list of `Perturbation`; `Perturbation.every(kind)` for each gene of each cell by itself; `Perturbation.screen(kind)` to estimate all genes and
                run the most promising ones.

        Returns:
            `pa.Table` with the columns of `SCHEMA`. Long runs are better written as they go: `write`.

        Raises:
            SettingError, UnknownGeneError, VocabularyMismatchError
        """
        tokens = self.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
        plan = self._plan(tokens, perturbations, probe=False)
        self._settle_states(lambda: self._states_of(cells, gene_ids, counts_layer, genome))
        return self._builder().table(self.iter_cells(tokens, perturbations, plan.rows))

    def write(
        self, cells: Any, perturbations: EveryGene | Sequence[Perturbation], output: str | Path, *, overwrite: bool = False,
        gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None,
    ) -> Path:  # fmt: skip
        """Perturb cells, and write what it does to them as it goes.

        Parts are kept beside the output: the same call goes on where it stopped, and returns at once when the table is whole. Under `torchrun` or
        `accelerate launch` each process takes its share. Memory holds one part.

        Args:
            cells, perturbations: as in `run`.
            output (`str` or `Path`): a new Parquet file.

        Returns:
            `Path` of the table, for `perturbation_statistics`, `perturbation_effects` or `pyarrow`.

        Raises:
            SettingError, UnknownGeneError, VocabularyMismatchError
            OutputExistsError: if the output holds the result of another plan.
            OutputError: if the disk is too small for it.
        """
        tokens, output = self.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome), Path(output)
        plan = self._plan(tokens, perturbations, probe=False)
        if output.is_file() and not overwrite:
            if plan_of(output) == plan.identity:
                logger.warning("%s is whole already.", output)
                return output
            msg = f"{output} exists and was made otherwise. Choose another name, or pass --overwrite (`overwrite=True`) to replace it."
            raise OutputExistsError(msg)
        plan.require_room(output.parent)
        with shared_parts(output, plan.identity, overwrite=overwrite) as (folder, finish):
            self._settle_states(lambda: shared_states(folder.parent, lambda: self._states_of(cells, gene_ids, counts_layer, genome)))
            groups = list(plan.parts())
            paths = [folder / f"cells-{int(group[0]):09d}-{int(group[-1]):09d}.parquet" for group in groups]
            mine = [(group, path) for group, path in mine_of(list(zip(groups, paths, strict=True))) if not path.is_file()]
            if mine:
                builder, whole = self._builder(), perturbations.judged_rows(plan.rows) if isinstance(perturbations, Screen) else None
                # One pass over the cells, however many parts there are.
                done = self.iter_cells(
                    tokens, perturbations, np.concatenate([group for group, _ in mine]), parts=[len(group) for group, _ in mine], whole=whole
                )
                for group, path in mine:
                    table = builder.table(islice(done, len(group)))
                    with new_part(path) as partial:
                        write_part(table, partial)
            finish(paths)
        return output

    def _states_of(self, cells: Any, gene_ids: str | None, counts_layer: str | None, genome: str | None) -> StateVectors:
        return StateVectors.of(
            self.model, cells, self.states.column, n_layers=self.n_layers, pooling=self.pooling, tokenizer=self._tokenizer, gene_ids=gene_ids,  # type: ignore[union-attr]
            counts_layer=counts_layer, genome=genome, device=self.device, progress=self.progress,
        )  # fmt: skip

    def _settle_states(self, compute: Callable[[], StateVectors]) -> None:
        """Have the vectors of the states: those given, or computed ones."""
        if self.states is None:
            return
        vectors = self._given_vectors or compute()
        vectors.require_made_with(self.model, n_layers=self.n_layers, pooling=self.pooling)
        self.reader = self._reader(vectors.only(self.states.targets))

    def _builder(self) -> TableBuilder:
        names = self.tokenizer.gene_table.ensembl_of_tokens(range(self.config.vocab_size))
        classes = [f"{head.name}: {name}" if len(self.reader.heads) > 1 else name for head in self.reader.heads for name in head.names]
        return TableBuilder(names, states=[] if self.states is None else self.states.targets, classes=classes)

    def iter_cells(
        self, tokens: Cells, perturbations: EveryGene | Sequence[Perturbation], rows: np.ndarray | None = None, *, parts: Sequence[int] | None = None,
        whole: frozenset[int] | None = None,
    ) -> Iterator[PerturbedCell]:  # fmt: skip
        """Perturb cells one after the other.

        Args:
            rows (int64, sorted, *optional*): which cells; all otherwise.
            parts: numbers of cells that belong together: no pass holds cells of two, so that each part has the same values whichever others are run.
            whole: of a screening, the cells that are run in whole; told from `rows` otherwise.

        Yields:
            `PerturbedCell`, in the order of the cells; one without any change that could be made has none.
        """
        wanted = np.arange(tokens.n_cells) if rows is None else rows
        changes_of = self._chooser(perturbations, wanted, whole)
        with ExitStack() as stack:
            stack.enter_context(self.encoder.ready())
            if isinstance(perturbations, Screen):
                stack.enter_context(frozen(self.model))
            bar = tqdm(total=len(wanted), unit=" cells", desc="Perturbing", disable=not (self.progress and processes().is_main_process))
            stack.enter_context(bar)
            cells = self._wholes(tokens, wanted)
            for batch in (batch for n in parts or [len(wanted)] for batch in _batches(islice(cells, n))):
                chosen = list(self.encoder.beside(changes_of, batch))
                for (estimate, _), done in zip(chosen, self._perturb([(cell, changes) for cell, (_, changes) in zip(batch, chosen, strict=True)]), strict=True):
                    yield replace(done, estimate=estimate)
                    bar.update()

    def _chooser(
        self, perturbations: EveryGene | Sequence[Perturbation], rows: np.ndarray, whole: frozenset[int] | None
    ) -> Callable[[_Whole], tuple[Estimate | None, list[Change]]]:
        """Return what says which changes are made in a cell."""
        if not isinstance(perturbations, EveryGene):
            listed = self.changes_of(perturbations)
            return lambda cell: (None, listed)
        if not isinstance(perturbations, Screen):
            return lambda cell: (None, perturbations.of(cell.genes))
        target = self._screened_towards(perturbations)
        place = self.states.targets.index(target) if target else 0  # type: ignore[union-attr]
        screener = CellScreener(
            self.model, perturbations, n_layers=self.n_layers, pooling=self.pooling, target=target, state_e=self.reader.states_se[place] if target else None  # type: ignore[index]
        )  # fmt: skip
        judged = perturbations.judged_rows(rows) if whole is None else whole

        def choose(cell: _Whole) -> tuple[Estimate | None, list[Change]]:
            estimate = screener.estimate(cell.tokens, cell.first_gene, cell.n_genes)
            if estimate is None or cell.row in judged:
                return estimate, perturbations.of(cell.genes)
            return estimate, [estimate.changes[i] for i in estimate.best(perturbations.top)]

        return choose

    def _screened_towards(self, screen: Screen) -> str:
        """Return the state that genes are screened for; empty for how far they change the cell.

        Raises:
            SettingError
        """
        if self.readout == PROBABILITY:
            msg = "screening estimates the readouts cell and state; probabilities of a classifier are read by running every gene: Perturbation.every(kind)."
            raise SettingError(msg)
        if self.n_layers == 0:
            msg = "screening looks at what layers make of a cell, and layer is 0, the embedding layer. Choose a later one."
            raise SettingError(msg)
        known = () if self.states is None else self.states.targets
        if screen.towards is not None and screen.towards not in known:
            msg = f"screening towards {screen.towards!r}: expected one of the states of this run ({', '.join(known) or 'there are none; give states'})."
            raise SettingError(msg)
        return screen.towards or ("" if self.states is None else self.states.goal)

    def _wholes(self, tokens: Cells, rows: np.ndarray) -> Iterator[_Whole]:
        asked = np.zeros(tokens.n_cells, dtype=bool)
        asked[rows] = True
        for given in tokens.chunks():
            chunk = given.without(self.config.pad_token_id)
            chunk.require_fits(self.config)
            for i in np.flatnonzero(asked[chunk.start : chunk.start + chunk.n_cells]).tolist():
                ids = chunk.input_ids[chunk.offsets[i] : chunk.offsets[i + 1]].astype(np.int64)
                first = int(self.config.cls_token_id is not None and len(ids) > 0 and int(ids[0]) == self.config.cls_token_id)
                if self.pooling == "cls" and not first:
                    msg = f"pooling 'cls': cell {chunk.cell_ids[i]} does not begin with <cls> ({self.config.cls_token_id}). Tokenize the cells with this model's tokenizer, or use pooling='mean'."
                    raise VocabularyMismatchError(msg)
                end = int(self.config.eos_token_id is not None and len(ids) > first and int(ids[-1]) == self.config.eos_token_id)
                yield _Whole(chunk.start + i, chunk.cell_ids[i], ids, first, len(ids) - first - end)

    def _perturb(self, batch: Sequence[tuple[_Whole, Sequence[Change]]]) -> Iterator[PerturbedCell]:
        """Run some cells before their changes, then after them."""
        jobs: list[list[tuple[Change, ChangedCell]]] = []
        wholes: list[Variant] = []
        for place, (whole, changes) in enumerate(batch):
            mine = [(change, after) for change in changes if (after := changed(whole.genes, change, most=self.most_genes)) is not None]
            jobs.append(mine)
            # What falls off the end is left out of the cell before the change as well, so that the same genes are compared.
            losses = sorted({after.n_lost for _, after in mine})
            wholes += [Variant(whole.around(whole.genes[: whole.n_genes - lost]), (place, lost)) for lost in losses]
        before = dict(
            self.encoder.read(
                wholes,
                lambda some, hidden_te, lengths: [
                    (v.about, self.reader.before(v.tokens, hidden_le)) for v, hidden_le in zip(some, hidden_te.split(lengths), strict=True)
                ],
            )
        )
        variants = (variant for place, (whole, _) in enumerate(batch) for variant in self._variants(place, whole, jobs[place], before))
        shifts = self.encoder.read(variants, lambda some, hidden_te, lengths: self.reader.after([(*v.about, v.tokens) for v in some], hidden_te, lengths))
        for place, (whole, _) in enumerate(batch):
            mine = jobs[place]
            yield PerturbedCell(whole.row, whole.cell_id, whole.n_genes, [c for c, _ in mine], [a for _, a in mine], [next(shifts) for _ in mine])

    def _variants(self, place: int, whole: _Whole, jobs: Sequence[tuple[Change, ChangedCell]], before: dict[tuple[int, int], Before]) -> Iterator[Variant]:
        single = Counter(change.kind for change, _ in jobs if len(change.tokens) == 1)
        # Getting a cell ready to share costs about as much as one variant saves.
        scans = {kind: ScannedCell(whole.tokens, whole.first_gene, kind == OVEREXPRESS) for kind in (DELETE, OVEREXPRESS) if single[kind] >= FEWEST_TO_SHARE}
        for change, after in jobs:
            tokens, about = whole.around(after.tokens), (before[place, after.n_lost], after)
            ranks = np.flatnonzero(whole.genes == change.tokens[0]).tolist() if len(change.tokens) == 1 and change.kind in scans else []
            yield Variant(tokens, about, scans[change.kind], whole.first_gene + ranks[0]) if ranks else Variant(tokens, about)


def _batches(cells: Iterator[_Whole]) -> Iterator[list[_Whole]]:
    while batch := list(islice(cells, CELLS_AT_ONCE)):
        yield batch
