"""What a student has to have."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MemoryProtocol(Protocol):
    """What `SMTTrainer` and `DMTTrainer` ask of a causal language model, any that has it.

    A memory is (N, K, D) in float32 (float64 in a float64 model): the whole state of N sequences, as K tokens of D
    channels. The models of `hf_rnn` have all five, and say by `check_memories` which of them memories cannot train:
    `isinstance` looks for the names.

    A sixth may be there, and saves time in rollouts: `update_memories(memory, input_ids, mask=None)`, the memories
    after each of several more tokens, (N, K, D) and (N, T) to (N, T, K, D); where the mask (N, T) is False nothing is
    read.
    """

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(K, D)."""

    def initial_memory(self, batch_size: int) -> Tensor:
        """The memory before the first token, (N, K, D)."""

    def update_memory(self, memory: Tensor, input_ids: Tensor) -> Tensor:
        """The memory after one more token: (N, K, D) and (N,) to (N, K, D), differentiably."""

    def read_memory(self, memory: Tensor, input_ids: Tensor) -> Tensor:
        """Next-token logits: (N, K, D) and the token taken in last, (N,), to (N, V)."""

    def to_memory(self, tokens: Tensor) -> Tensor:
        """Vectors of length sqrt(D), (N, K, D), as a memory that the model itself could hold, differentiably."""
