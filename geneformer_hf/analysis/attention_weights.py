"""The attention weights of single cells, named by gene: the model's own, of its self-attention under eager attention, for one unpadded cell at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..device import resolve_device
from ..errors import LayerError
from ..models.attention import eager_attention
from .cells import Cells
from .embeddings import Embedder


@dataclass(frozen=True)
class CellAttention:
    """The attention weights of one cell."""

    cell_id: str
    names: list[str]
    """Its tokens: Ensembl ids in the order of their ranks, `<cls>` and `<eos>` where they stand."""
    layers: list[int]
    """Which layers, 0 the first."""
    weights: np.ndarray
    """float32 of shape `(layers, heads, l, l)`: from each token (row) to each token (column); rows sum to 1."""


def iter_attention(
    model: Any,
    cells: Any,
    *,
    layers: Sequence[int] | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    **options: Any,
) -> Iterator[CellAttention]:
    """Yield the attention weights of each cell that holds genes, in order.

    All asked-for layers of a cell are held at once: 12 layers of 12 heads over 2,048 tokens take 2.4 GB.

    Args:
        model, cells, gene_ids, counts_layer, genome: as in `embed_cells`.
        layers (`Sequence[int]`, *optional*): 0 is the first, -1 the last; all otherwise.
        options: tokenizer, device, quantization, progress, as there.

    Raises:
        LayerError: if there is no such layer; and as `embed_cells`.
    """
    reader = AttentionReader(model, layers, **options)
    tokens = reader.runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    names = _names(reader.runner, tokens)
    for cell_id, ids, by_layer in reader.cells(tokens, reader.layers):
        weights = torch.stack([by_layer[layer] for layer in reader.layers]).float().cpu().numpy()
        yield CellAttention(cell_id, [names[token] for token in ids.tolist()], reader.layers, weights)


Use = Callable[[int, torch.Tensor, torch.Tensor], Any]
"""What to do with a layer, the tokens of a cell `(l,)`, and its weights `(heads, l, l)`."""


class AttentionReader:
    """A model that gives its attention weights, a layer at a time.

    Args:
        model: as in `embed_cells`.
        layers (`Sequence[int]`, *optional*): 0 is the first, -1 the last; all otherwise.

    Raises:
        LayerError: if there is no such layer.
    """

    def __init__(self, model: Any, layers: Sequence[int] | None, **options: Any) -> None:
        self.runner = Embedder(model, pooling="mean", **options)
        n_layers = self.runner.config.num_hidden_layers
        asked = list(range(n_layers)) if layers is None else list(layers)
        beyond = [layer for layer in asked if not -n_layers <= layer < n_layers]
        if beyond or not asked:
            msg = f"layers {beyond or asked}: this model has {n_layers} layers of attention, from 0 (or {-n_layers}) to {n_layers - 1} (or -1)."
            raise LayerError(msg)
        self.layers = sorted({layer % n_layers for layer in asked})
        self.device = resolve_device(options.get("device"))

    def cells(self, tokens: Cells, layers: Sequence[int]) -> Iterator[tuple[str, torch.Tensor, dict[int, torch.Tensor]]]:
        """Yield id, tokens and, by layer, weights of shape `(heads, l, l)` of each cell with genes."""
        kept: dict[int, torch.Tensor] = {}
        for cell_id, ids in self._running(tokens, layers, lambda layer, ids, weights: kept.__setitem__(layer, weights)):
            yield cell_id, ids, dict(kept)
            kept.clear()

    def fold(self, tokens: Cells, layers: Sequence[int], use: Use) -> None:
        """Call a function with layer, tokens and weights of each cell; no weights are held after it."""
        for _ in self._running(tokens, layers, use):
            pass

    def _running(self, tokens: Cells, layers: Sequence[int], use: Use) -> Iterator[tuple[str, torch.Tensor]]:
        model, config = self.runner.model, self.runner.config
        bert, now = model.base_model, dict[str, torch.Tensor]()
        with (
            eager_attention(model),
            self.runner.encoder.ready(),
            _hooks(bert, layers, lambda layer, weights: use(layer, now["ids"], weights)),
            tqdm(total=tokens.n_cells, unit=" cells", desc="Attention", disable=not self.runner.progress) as bar,
        ):
            for given in tokens.chunks():
                chunk = given.without(config.pad_token_id)
                chunk.require_fits(config)
                has_genes = chunk.n_genes(config) > 0
                for cell in range(chunk.n_cells):
                    bar.update(1)
                    if not has_genes[cell]:
                        continue
                    now["ids"] = torch.from_numpy(chunk.input_ids[chunk.offsets[cell] : chunk.offsets[cell + 1]].astype(np.int64))
                    with torch.inference_mode():
                        bert(input_ids=now["ids"].unsqueeze(0).to(self.device))
                    yield chunk.cell_ids[cell], now["ids"]


@contextmanager
def _hooks(bert: Any, layers: Sequence[int], use: Callable[[int, torch.Tensor], Any]) -> Iterator[None]:
    """Hand on the weights that a layer's self-attention gives, as soon as it does."""

    def hook(layer: int) -> Any:
        return lambda module, arguments, output: use(layer, output[1].squeeze(0))

    handles = [bert.encoder.layer[layer].attention.self.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(runner: Embedder, tokens: Cells) -> list[str]:
    tokenizer = runner.tokenizer()
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(range(runner.config.vocab_size)))]
