"""Run by two processes: 20 steps of a model sharded with `fully_shard`, and of the same model whole, on the same packed cells."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM
from geneformer_hf.data.packing import pack_cells
from geneformer_hf.models.attention import PACKED_ATTENTION
from geneformer_hf.training.planned import is_sharded
from tests.training.conftest import NO_DROPOUT

WORLD = 2


def new_model():
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(GeneformerConfig(vocab_size=64, **NO_DROPOUT)).train()
    model.set_attn_implementation(PACKED_ATTENTION)
    return model


def batches(step):
    """The cells of a step, one batch for each process."""
    rng = np.random.default_rng(step)
    out = []
    for _ in range(WORLD):
        lengths = rng.integers(5, 40, 4)
        ids = rng.integers(4, 64, lengths.sum())
        out.append(pack_cells(lengths, np.where(rng.random(len(ids)) < 0.15, 1, ids), np.where(rng.random(len(ids)) < 0.3, ids, -100)))
    return out


def train(model, mine):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(20):
        parts = batches(step)
        items = sum(int((part["labels"] != -100).sum()) for part in parts)
        total = torch.zeros(())
        for part in mine(parts):
            loss = model(**part, num_items_in_batch=items).loss
            # Sharding averages gradients over processes, and the loss is a sum over them.
            (loss * (WORLD if is_sharded(model) else 1)).backward()
            total += loss.detach()
        if is_sharded(model):
            dist.all_reduce(total)
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(folder):
    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD
    rank = dist.get_rank()
    model = new_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = train(model, lambda parts: parts[rank : rank + 1])
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save({"losses": losses, "weights": weights}, folder / "gathered.pt")
        whole = new_model()
        assert not is_sharded(whole)
        losses = train(whole, lambda parts: parts)
        torch.save({"losses": losses, "weights": whole.state_dict()}, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
