"""Export a model for ONNX Runtime, in 32 and 8 bits, and embed cells without torch.

python examples/export_onnx.py cells.h5ad geneformer-v2 graphs
"""

import sys

import anndata
import numpy as np
import onnxruntime

from geneformer_hf import GeneformerTokenizer, embed_cells, export_onnx

cells, model, folder = sys.argv[1:4]

done = export_onnx(model, folder, int8=True)
print(f"{', '.join(name for name in done.files if name.endswith('.onnx'))}: {done.error:.0e} from torch")

adata = anndata.read_h5ad(cells)
batch = GeneformerTokenizer.from_pretrained(folder)(adata, padding=True, return_tensors="np")
expected = embed_cells(model, adata, pooling="cls")
for name in ("encoder", "encoder_int8"):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    _, second_to_last = session.run(None, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    off = np.linalg.norm(second_to_last[:, 0] - expected, axis=1).mean() / np.linalg.norm(expected, axis=1).mean()
    print(f"{name}: embeddings {off:.2%} from those of embed_cells")
