"""The transformer that says what to remember."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


@strict
class SMTTeacherConfig(PreTrainedConfig):
    """Configuration of `SMTTeacher`.

    Args:
        vocab_size: the student's.
        num_memory_tokens, memory_size: the student's memory (K, D).
        hidden_size: width of encoder and decoder.
        encoder_layers, decoder_layers: their depths; the paper's are 8 and 4.
        num_heads: attention heads of both; rotary positions need an even number of channels in each.
        all_positions: the encoder is causal and gives the memories of all positions in one pass; else it sees the
            past as a whole and gives one memory, as in the paper.
        initializer_range: standard deviation of the initial weights; None: sqrt(2 / (5 hidden_size)) (Nguyen and
            Salazar, arXiv 1910.05895), since Llama's 0.02 is small for narrow networks.
    """

    model_type = "hf_rnn_smt_teacher"

    vocab_size: int = 259
    num_memory_tokens: int = 8
    memory_size: int = 128
    hidden_size: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    num_heads: int = 4
    all_positions: bool = False
    initializer_range: float | None = None

    def validate_architecture(self):
        """Part of the validation that `@strict` runs; raises ValueError."""
        for name in ("vocab_size", "num_memory_tokens", "memory_size", "encoder_layers", "decoder_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of {2 * self.num_heads}, twice num_heads, got {self.hidden_size}"
            )

    @property
    def initial_std(self) -> float:
        return (2 / (5 * self.hidden_size)) ** 0.5 if self.initializer_range is None else self.initializer_range

    def transformer(self, layers: int, is_causal: bool) -> LlamaConfig:
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=-int(-8 * self.hidden_size // 24) * 8,  # 8/3: as many weights as 4 without a gate
            num_hidden_layers=layers,
            num_attention_heads=self.num_heads,
            initializer_range=self.initial_std,
            use_cache=False,
            pad_token_id=None,
        )
        config.is_causal = is_causal
        return config


def memory_shape(student: Any) -> tuple[int, int]:
    """(K, D) of a student's memories.

    Raises:
        TypeError: a model without memories.
        ValueError: one that says why memories cannot train it.
    """
    if hasattr(student, "memory_shape"):
        return student.memory_shape
    if hasattr(student, "check_memories"):
        return student.check_memories()
    raise TypeError(
        f"model: expected a causal language model with memory_shape, initial_memory, update_memory, read_memory and "
        f"to_memory (see hf_rnn.MemoryProtocol), got {type(student).__name__}"
    )


class SMTTeacher(PreTrainedModel):
    """Encoder of the past into a memory, decoder of the future from it ("Pretraining Recurrent Networks without
    Recurrence", 2026): m_t = E(x_..t), p(y_t..) = D(m_t, x_t+1..). Thrown away when the student is trained.

    Both are transformers' Llama (rotary positions, RMS norms, SwiGLU). The encoder reads [past; K learned registers]
    in both directions, its last K outputs are the memory; the decoder reads [memory; future tokens] causally.
    """

    config_class = SMTTeacherConfig
    base_model_prefix = "teacher"
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config: SMTTeacherConfig):
        super().__init__(config)
        size, tokens = config.hidden_size, config.num_memory_tokens
        self.encoder = LlamaModel(config.transformer(config.encoder_layers, is_causal=config.all_positions))
        self.decoder = LlamaModel(config.transformer(config.decoder_layers, is_causal=True))
        if config.all_positions:
            self.to_memory = nn.Linear(size, tokens * config.memory_size)
        else:
            self.registers = nn.Parameter(torch.empty(tokens, size))
            self.to_memory = nn.Linear(size, config.memory_size)
        self.from_memory = nn.Linear(config.memory_size, size)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initial_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif module is self and not self.config.all_positions:
            init.normal_(self.registers, std=self.config.initial_std)
        else:
            super()._init_weights(module)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The memory of a context, padded on the left, (N, C) and (N, C) to (N, K, D): vectors of length sqrt(D)."""
        if self.config.all_positions:
            x = self.encoder(ids, attention_mask=mask.long()).last_hidden_state[:, -1:]
            return self._normalized(x)[:, 0]
        x = torch.cat([self.encoder.embed_tokens(ids), self.registers.expand(len(ids), -1, -1)], 1)
        mask = F.pad(mask, (0, len(self.registers)), value=True)
        x = self.encoder(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
        return self._normalized(x[:, ids.shape[1] :])

    def encode_all(self, ids: Tensor) -> Tensor:
        """The memories after each token, (B, T) to (B, T, K, D). Only with `all_positions`."""
        return self._normalized(self.encoder(ids).last_hidden_state)

    def _normalized(self, x: Tensor) -> Tensor:
        tokens = self.to_memory(x).float().unflatten(-1, (-1, self.config.memory_size))
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        return tokens if self.config.all_positions else tokens.squeeze(-2)

    def decode(self, memory: Tensor, ids: Tensor) -> Tensor:
        """Logits of the future: (N, K, D) and its tokens but the last, (N, F - 1), to (N, F, V)."""
        prefix = self.from_memory(memory.to(self.from_memory.weight.dtype))
        x = torch.cat([prefix, self.decoder.embed_tokens(ids)], 1)
        x = self.decoder(inputs_embeds=x).last_hidden_state
        return self.lm_head(x[:, memory.shape[1] - 1 :])

    @classmethod
    def for_student(cls, student: Any, **settings: Any) -> "SMTTeacher":
        """A new teacher whose memories are the student's; its width, too, unless told otherwise."""
        tokens, size = memory_shape(student)
        width, heads = settings.get("hidden_size", size), settings.get("num_heads", 4)
        if heads < 1 or width % (2 * heads):
            raise ValueError(
                f"teacher_hidden_size, teacher_heads: expected a width of a multiple of twice the heads, got {width} "
                f"(a memory token's unless told otherwise) and {heads}"
            )
        fitting = dict(vocab_size=student.config.vocab_size, num_memory_tokens=tokens, memory_size=size)
        return cls(SMTTeacherConfig(**dict(hidden_size=size) | settings | fitting))

    def check_fits(self, student: Any) -> None:
        """Raise ValueError where memories or vocabulary are not the student's."""
        mine = (self.config.vocab_size, self.config.num_memory_tokens, self.config.memory_size)
        theirs = (student.config.vocab_size, *memory_shape(student))
        if mine != theirs:
            raise ValueError(
                f"teacher: expected one for the student's vocabulary and memory (V, K, D) = {theirs}, got {mine}"
            )
