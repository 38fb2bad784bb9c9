"""Every tolerance of the tests, with its reason. None is loosened to pass."""

GOLDEN_EMBEDDING = 2e-5
"""Against the published package's embeddings (float32, other kernels, other summation order)."""
SAME_MODEL = 1e-5
"""The same cell in another batch, order or padding."""
NAIVE_TWIN = 2e-5
"""Packed encoder against padded batches through the whole model."""
LOSS = 1e-6
"""The same loss summed in another order."""
BF16 = 5e-2
"""bfloat16 against float32 on a tiny model with activations of order one: 8 bits of mantissa over a few layers."""
RANKED_VALUE = 1e-6
"""Neighbouring values in a published ranking, which was computed in float32, may be out of order by this share."""
MEDIAN = 1e-3
"""Gene medians by sketch against exact ones, as promised; measured 8e-4 for genes in more than 16,384 cells."""
SINGLE_PRECISION = 1e-7
"""Values kept as float32 on the way."""
