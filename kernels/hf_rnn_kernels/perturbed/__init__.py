"""Many perturbed copies of a model in one forward pass: weights W + left right^T of low rank, never materialised.

For zero-order training and evolution strategies ("Evolution Strategies at the Hyperscale", arXiv 2511.16652): M members
share W, which is read once for all of them. A member's rows are consecutive: rows m * R / M to (m + 1) * R / M - 1 of a
batch of R. Shapes: M members, R rows, T time, I in and O out channels, K the rank, V vocabulary.
"""

from hf_rnn_kernels.perturbed.op import perturbed_embedding, perturbed_linear
from hf_rnn_kernels.perturbed.parameter import Perturbed

__all__ = ["Perturbed", "perturbed_embedding", "perturbed_linear"]
