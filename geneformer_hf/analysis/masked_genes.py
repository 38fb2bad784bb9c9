"""Genes of cells that are hidden and asked for: how likely the model finds what stood there, and what it would have put."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data.masking import CellKey, GeneMasker, MaskingRates
from ..errors import CheckpointError, SettingError
from ..models.encoding import EncodedPass
from ..models.heads import IGNORED
from ..models.modeling_geneformer import GeneformerForMaskedLM
from ..models.tokenization_geneformer import GeneformerTokenizer
from .cells import Cells, TokenChunk
from .embeddings import Embedder

COLUMNS = ("cell_id", "position", "ensembl_id", "symbol", "probability", "place", "predicted", "predicted_probability")


def predict_masked_genes(
    model: Any,
    cells: Any,
    *,
    genes: Sequence[str] | None = None,
    share: float = 0.15,
    top_k: int = 5,
    seed: int = 42,
    tokenizer: GeneformerTokenizer | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Put `<mask>` in the place of genes of each cell, all at once, and ask the model for them.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): a masked-gene model, or its folder or Hub id.
        cells (`AnnData`, `str`, `Path` or `datasets.Dataset`): as in `embed_cells`.
        genes (`Sequence[str]`, *optional*): hide these (Ensembl ids or symbols) where a cell has them; some of all genes otherwise.
        share (`float`, *optional*, defaults to 0.15): without `genes`, the chance of each gene to be hidden, drawn by `seed` and the place of the cell, as in pretraining.
        top_k (`int`, *optional*, defaults to 5): likeliest genes to name.
        seed (`int`, *optional*, defaults to 42).
        tokenizer, batch_size, device, dtype, quantization, gene_ids, counts_layer, genome, progress: as in `embed_cells`.

    Returns:
        `pd.DataFrame`, a line for each hidden gene, cells and ranks in order: `cell_id`; `position`, its rank in the cell, 1 the highest;
        `ensembl_id` and `symbol`; `probability` that the model gives it; `place` among all genes, 1 where it is the likeliest; `predicted`, the
        likeliest genes, and `predicted_probability`, theirs. Probabilities are over the whole vocabulary.

    Raises:
        CheckpointError: if the model does not predict masked genes.
        UnknownGeneError, SettingError, VocabularyMismatchError, CellFileError, NotRawCountsError, GeneIdError
    """
    options = {"batch_size": batch_size, "device": device, "dtype": dtype, "quantization": quantization, "progress": progress}
    runner = MaskedGenePredictor(model, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    return runner.table(tokens, genes=genes, share=share, top_k=top_k, seed=seed)


class MaskedGenePredictor(Embedder):
    """A masked-gene model made ready to predict."""

    doing = "Predicting"

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, layer=-1, pooling="mean", **options)
        if not isinstance(self.model, GeneformerForMaskedLM):
            msg = f"{type(self.model).__name__} does not predict masked genes. Use a pretrained model (GeneformerForMaskedLM)."
            raise CheckpointError(msg)

    def table(
        self, tokens: Cells, *, genes: Sequence[str] | None = None, share: float = 0.15, top_k: int = 5, seed: int = 42, with_cell: bool = False
    ) -> pd.DataFrame:
        """Return what is predicted, as `predict_masked_genes`; with `cell`, the place of the cell among all cells, where that is asked for."""
        table = self.gene_table(tokens)
        if not 0 < top_k <= len(table):
            msg = f"top_k is {top_k}; expected 1 to {len(table):,} genes."
            raise SettingError(msg)
        wanted = None if genes is None else table.token_of(genes)
        parts = [pd.DataFrame(part) for part in self._parts(tokens, wanted, share, top_k, seed)]
        found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS[:2], "token", *COLUMNS[4:], "cell"])
        row_of = {token: row for row, token in enumerate(table.token_ids.tolist())}
        rows = [row_of[token] for token in found.pop("token")]
        found["ensembl_id"], found["symbol"] = [table.ensembl_ids[row] for row in rows], [table.symbols[row] for row in rows]
        found["predicted"] = [[table.ensembl_ids[row_of[token]] for token in tokens] for tokens in found["predicted"]]
        return found[[*COLUMNS, *(["cell"] if with_cell else [])]]

    def _parts(self, tokens: Cells, wanted: np.ndarray | None, share: float, top_k: int, seed: int) -> Iterator[dict[str, Any]]:
        no_gene = torch.ones(self.config.vocab_size, dtype=torch.bool)
        no_gene[torch.from_numpy(self.gene_table(tokens).token_ids.astype(np.int64))] = False
        masker = GeneMasker(self.tokenizer(), MaskingRates(chosen=share, masked=1.0, random=0.0), seed=seed)
        with self.encoder.ready(), tqdm(total=tokens.n_cells, unit=" cells", desc=self.doing, disable=not self.progress) as bar:
            for given in tokens.chunks():
                chunk = given.without(self.config.pad_token_id)
                chunk.require_fits(self.config)
                if wanted is None:
                    keys = [CellKey(0, chunk.start + i, 0) for i in range(chunk.n_cells)]
                    ids, labels = masker.hide(chunk.input_ids, np.diff(chunk.offsets), keys)
                    hidden = labels != IGNORED
                else:
                    hidden = np.isin(chunk.input_ids, wanted)
                    ids = np.where(hidden, masker.mask_token_id, chunk.input_ids)
                some = np.flatnonzero(np.diff(np.concatenate(([0], np.cumsum(hidden)))[chunk.offsets]) > 0)
                bar.update(chunk.n_cells - len(some))
                made = []
                for done in self.encoder.encode(ids, chunk.offsets, some):
                    bar.update(len(done.cells))
                    made.append(self._predict(chunk, done, hidden, no_gene, top_k))
                yield from _in_order(chunk, made, self.tokenizer().all_special_ids)

    def _predict(self, chunk: TokenChunk, done: EncodedPass, hidden: np.ndarray, no_gene: torch.Tensor, top_k: int) -> dict[str, Any]:
        spans = [np.arange(chunk.offsets[i], chunk.offsets[i + 1]) for i in done.cells]
        flags = torch.from_numpy(np.concatenate([hidden[span] for span in spans]))
        places = np.concatenate(spans)[flags.numpy()]
        states = done.hidden[flags.to(done.hidden.device)]
        lower = states.dtype in (torch.bfloat16, torch.float16)
        with torch.inference_mode(), torch.autocast(states.device.type, dtype=states.dtype if lower else torch.bfloat16, enabled=lower):
            logits = self.model.cls(states).float()
        p = logits.softmax(-1)
        true = torch.from_numpy(chunk.input_ids[places].astype(np.int64)).to(p.device).unsqueeze(1)
        of_genes = logits.masked_fill(no_gene.to(p.device), -torch.inf)
        best = of_genes.topk(top_k, dim=-1).indices
        return {
            "place_in_chunk": places,
            "probability": p.gather(1, true).squeeze(1).cpu().numpy(),
            "place": (of_genes > of_genes.gather(1, true)).sum(1).add(1).cpu().numpy(),
            "predicted": best.cpu().tolist(),
            "predicted_probability": p.gather(1, best).cpu().tolist(),
        }


def _in_order(chunk: TokenChunk, made: list[dict[str, Any]], special: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what was predicted of a chunk, cell by cell and rank by rank, whatever the order of the passes."""
    if not made:
        return
    places = np.concatenate([part["place_in_chunk"] for part in made])
    order = np.argsort(places)
    places = places[order]
    cells = np.searchsorted(chunk.offsets, places, side="right") - 1
    starts = chunk.offsets[cells]
    # Ranks count genes: <cls>, where there is one, stands before them.
    begins = np.isin(chunk.input_ids[starts], special)
    joined = {name: [value for part in made for value in part[name]] for name in ("probability", "place", "predicted", "predicted_probability")}
    yield {
        "cell_id": [chunk.cell_ids[i] for i in cells],
        "cell": chunk.start + cells,
        "position": places - starts + 1 - begins,
        "token": chunk.input_ids[places],
        **{name: [values[i] for i in order] for name, values in joined.items()},
    }
