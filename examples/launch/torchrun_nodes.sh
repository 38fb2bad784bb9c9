#!/usr/bin/env bash
# The same on every node: NODES=2 GPUS=8 MAIN=host-of-the-first-node ./torchrun_nodes.sh --config run.yaml
# All nodes must see the same data and output_dir (or set save_on_each_node), and WORLD = NODES * GPUS processes share the batch of a step:
# per_device_train_batch_size * gradient_accumulation_steps * WORLD cells. num_processes makes a run refuse to start with another number.
set -euo pipefail
torchrun --nnodes "${NODES:-1}" --nproc_per_node "${GPUS:-8}" --rdzv_backend c10d --rdzv_id pretrain --rdzv_endpoint "${MAIN:-localhost}:29500" \
    -m geneformer_hf pretrain --num_processes "$(( ${NODES:-1} * ${GPUS:-8} ))" "$@"
