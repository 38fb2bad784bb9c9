"""Put a fine-tuned model on the Hub, and let somebody else label cells with it.

python examples/share_model.py run/model lab/pbmc-types new_cells.h5ad
"""

import sys

from geneformer_hf import predict, push_folder

folder, repository, cells = sys.argv[1:4]

pushed = push_folder(folder, repository, private=True)
print(f"{pushed.kind} of {len(pushed.files)} files: {pushed.url}")

# Anybody with access, on another machine: the commit makes sure that it is this very model.
from_folder, from_hub = predict(folder, cells), predict(repository, cells)
print(from_hub.to_frame().iloc[:3, :3])
print(f"the same labels as from the folder: {(from_folder.labels == from_hub.labels).all()}")
