"""Naive twins of the fast code: one loop a cell, no tricks."""

from __future__ import annotations

import numpy as np
import torch

TIE_BITS = 20


def rank_cell(counts_g: np.ndarray, token_ids_g: np.ndarray, medians_g: np.ndarray) -> list[int]:
    """Rank one dense cell: divide, drop what is not detected, sort stably; values that round to the same 44 bits are ties."""
    values = np.where(token_ids_g >= 0, counts_g / medians_g, 0.0)
    shift = np.uint64(TIE_BITS)
    rounded = (((values.view(np.uint64) + np.uint64(1 << (TIE_BITS - 1))) >> shift) << shift).view(np.float64)
    order = np.argsort(-rounded, kind="stable")
    return [int(token_ids_g[i]) for i in order if rounded[i] > 0]


def rank_exactly(counts_g: np.ndarray, token_ids_g: np.ndarray, medians_g: np.ndarray) -> list[int]:
    """Rank one dense cell by the published formula in float64, ties in column order."""
    values = counts_g / counts_g.sum() * 10_000 / medians_g
    order = np.argsort(-values, kind="stable")
    return [int(token_ids_g[i]) for i in order if values[i] > 0]


@torch.no_grad()
def hidden_states(model: torch.nn.Module, cell: list[int], layer: int) -> torch.Tensor:
    """Run one cell alone through the whole model, as anyone would, and take a layer."""
    return model(input_ids=torch.tensor([cell]), output_hidden_states=True).hidden_states[layer][0]


def embed_cell(model: torch.nn.Module, cell: list[int], layer: int, pooling: str) -> np.ndarray:
    hidden = hidden_states(model, cell, layer)
    if pooling == "cls":
        return hidden[0].numpy()
    special = {model.config.cls_token_id, model.config.eos_token_id} - {None}
    genes = [i for i, token in enumerate(cell) if token not in special]
    return hidden[genes].mean(0).numpy()


def gene_medians(counts_ng: np.ndarray, totals_n: np.ndarray) -> np.ndarray:
    """Return the exact median of each gene's non-zero counts per 10,000, NaN for genes in no cell."""
    scaled = counts_ng.astype(np.float64) / totals_n[:, None] * 10_000
    return np.array([np.median(column[column > 0]) if (column > 0).any() else np.nan for column in scaled.T])


def hide_genes(cell: list[int], key: tuple[int, int, int], genes: list[int], specials: set[int], mask: int, seed: int, rates=(0.15, 0.8, 0.1)):
    """Hide genes of one cell, one token at a time, from a generator made for this cell alone."""
    corpus, row, showing = key
    chosen_share, masked, drawn = rates
    words = np.random.Philox(key=[seed, corpus], counter=[0, 0, row, showing]).random_raw(len(cell))
    ids, labels = [], []
    for token, word in zip(cell, words.tolist(), strict=True):
        fate = (word % 2**32) / 2**32
        if token in specials or word // 2**32 >= round(chosen_share * 2**32):
            ids.append(token)
            labels.append(-100)
            continue
        labels.append(token)
        if fate < masked:
            ids.append(mask)
        elif fate < masked + drawn:
            ids.append(sorted(genes)[min(int((fate - masked) / drawn * len(genes)), len(genes) - 1)])
        else:
            ids.append(token)
    return ids, labels


def masked_gene_loss(model: torch.nn.Module, cells: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean loss over all hidden genes of some cells, each run alone with the head at every position."""
    losses = []
    for ids, labels in cells:
        logits = model.cls(model.bert(torch.tensor([ids])).last_hidden_state)[0]
        losses += [-torch.log_softmax(logits[i], 0)[label] for i, label in enumerate(labels) if label != -100]
    return torch.stack(losses).mean()


def contrast(vectors: list[list[float]], classes: list[int], batches: list[int], temperature: float) -> float:
    """Sum over cells of minus the mean log probability of their partners: their class in other batches, or where there are none in their own."""
    unit = [np.array(v) / np.linalg.norm(v) for v in vectors]
    known = [i for i in range(len(unit)) if classes[i] != -100 and batches[i] != -100]
    total = 0.0
    for i in known:
        others = [j for j in known if j != i]
        same = [j for j in others if classes[j] == classes[i]]
        partners = [j for j in same if batches[j] != batches[i]] or same
        if not partners:
            continue
        all_of_them = sum(np.exp(unit[i] @ unit[j] / temperature) for j in others)
        total -= np.mean([np.log(np.exp(unit[i] @ unit[j] / temperature) / all_of_them) for j in partners])
    return total


def perturbed(genes: list[int], kind: str, chosen: list[int], most: int) -> tuple[list[int], list[int]] | None:
    """Delete or overexpress genes of a cell, token by token. Return the new genes and those before that are left to compare, or None."""
    if kind == "delete":
        if any(gene not in genes for gene in chosen):
            return None
        new, old = [gene for gene in genes if gene not in chosen], genes
    else:
        new = chosen + [gene for gene in genes if gene not in chosen]
        lost = max(len(new) - most, 0)
        new, old = new[:most], genes[: len(genes) - lost]
    return None if not new or new == genes else (new, old)


def shifts(model: torch.nn.Module, cell: list[int], kind: str, chosen: list[int], *, layer: int, pooling: str, states: dict[str, np.ndarray]) -> dict | None:
    """Every readout of one change in one cell, by whole passes through the model and a cosine at a time."""
    config = model.config
    start = int(config.cls_token_id is not None and cell[0] == config.cls_token_id)
    stop = len(cell) - int(config.eos_token_id is not None and cell[-1] == config.eos_token_id)
    found = perturbed(cell[start:stop], kind, chosen, config.max_position_embeddings - start - (len(cell) - stop))
    if found is None:
        return None
    new, old = found
    vectors = {}
    for name, genes in (("new", new), ("old", old)):
        hidden = hidden_states(model, cell[:start] + genes + cell[stop:], layer)
        vectors[name] = hidden[0].numpy(), {gene: hidden[start + i].numpy() for i, gene in enumerate(genes)}

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    kept = [gene for gene in new if gene in old and gene not in chosen]
    own = {name: first if pooling == "cls" else np.mean(list(of_gene.values()), axis=0) for name, (first, of_gene) in vectors.items()}
    genes = {gene: cosine(vectors["new"][1][gene], vectors["old"][1][gene]) for gene in kept}
    return {
        "cell": cosine(own["new"], own["old"]) if pooling == "cls" else float(np.mean(list(genes.values()))),
        "gene": genes,
        "state": {name: cosine(own["new"], vector) - cosine(own["old"], vector) for name, vector in states.items()},
    }


def between_types(vectors: np.ndarray, types: list[int]) -> float:
    """Share of the summed squared distance to the mean that means of types explain, cell by cell."""
    centre = vectors.mean(axis=0)
    total = sum(float(((vector - centre) ** 2).sum()) for vector in vectors)
    explained = 0.0
    for kind in set(types):
        mine = vectors[[i for i, t in enumerate(types) if t == kind]]
        explained += len(mine) * float(((mine.mean(axis=0) - centre) ** 2).sum())
    return explained / total


@torch.no_grad()
def attention_of(model: torch.nn.Module, cell: list[int]) -> np.ndarray:
    """The weights of one cell alone, of all layers, as transformers gives them: `(layers, heads, l, l)`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = model.base_model(input_ids=torch.tensor([cell]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([weights[0] for weights in found]).numpy()


def mean_attention(model: torch.nn.Module, cells: list[list[int]], chosen: list[int], relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sums of attention between chosen tokens over cells, and how many cells hold both, one pair at a time."""
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    sums, together = np.zeros((*shape, len(chosen), len(chosen))), np.zeros((len(chosen), len(chosen)), dtype=int)
    for cell in cells:
        weights = attention_of(model, cell) * (len(cell) if relative else 1)
        for a, one in enumerate(chosen):
            for b, other in enumerate(chosen):
                if one in cell and other in cell:
                    sums[:, :, a, b] += weights[:, :, cell.index(one), cell.index(other)]
                    together[a, b] += 1
    return sums, together
