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
TRAJECTORY = 1e-5
"""Losses step by step of the same training with sums in another order (layouts, accumulation, processes): float32 over tens of steps; measured 1e-6."""
BF16_TRAJECTORY = 3e-2
"""The same in bfloat16 against float32 on a tiny model whose losses are about 4: 8 bits of mantissa; measured 1e-2."""
EQUALS_FREQUENCY = 0.05
"""Nats between a model that can learn nothing but gene frequency and that baseline, as the project asks."""
WEIGHTS_OF_TWO_PROCESSES = 1e-4
"""Two processes against one: gradients are summed in another order, and Adam divides by their size."""
QUANTISED_PROBABILITY = 2e-3
"""Probabilities of quantised models in other batches: 4-bit weights compute in bfloat16, whose sums depend on the shape of a batch; measured 3e-4."""
GOLDEN_PERTURBATION = 2e-5
"""Against the published package's cosines of perturbed cells; measured 1e-5 on single genes, 5e-7 on cells."""
STATISTICS = 1e-9
"""Means and p-values against published tables of the same raw values."""
BF16_PERTURBATION = 1e-2
"""Cosines of perturbed cells in bfloat16 against float32; measured 4e-3 on a tiny model and on a trained one."""
