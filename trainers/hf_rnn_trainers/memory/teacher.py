"""The transformer that says what to remember."""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_rnn_kernels.causal_conv import causal_conv
from hf_rnn_kernels.layout import ROWS, SequenceLayout


@strict
class SMTTeacherConfig(PreTrainedConfig):
    """Configuration of `SMTTeacher`.

    Args:
        vocab_size: the student's.
        num_memory_tokens, memory_size: the student's memory (K, D).
        hidden_size: width of encoder and decoder.
        encoder_layers, decoder_layers: their depths; the paper's are 8 and 4. Without a decoder (0) memories have to be
            taught what to hold by the readout's loss (`SMTConfig.coef_first`).
        num_heads: attention heads of both; rotary positions need an even number of channels in each.
        all_positions: the encoder is causal and gives the memories of all positions in one pass; else it sees the
            past as a whole and gives one memory, as in the paper.
        queries: with `all_positions` each memory token reads the past for itself, by a query of its own. Without, all K
            are linear maps of one vector of hidden_size channels, and memories have no more dimensions than that.
        conv_kernel: taps of a causal convolution over embeddings, which hands each token those before it; 0: none.
        timestamps: number of learned positions that are added to embeddings, besides rotary ones; 0: none. A context
            must not be longer.
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
    queries: bool = False
    conv_kernel: int = 0
    timestamps: int = 0
    initializer_range: float | None = None

    def validate_architecture(self):
        """Part of the validation that `@strict` runs; raises ValueError."""
        for name in ("vocab_size", "num_memory_tokens", "memory_size", "encoder_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("decoder_layers", "conv_kernel", "timestamps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.queries and not self.all_positions:
            raise ValueError("queries: the registers are such already; expected False without all_positions")
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


class ShortConvolution(nn.Module):
    """x_t + b + sum_j w_j x_{t-j}, each channel for itself: (N, T, D) to the same."""

    def __init__(self, size: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, kernel))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + causal_conv(x, None, self.weight, self.bias, ROWS if mask is None else SequenceLayout(mask))[0]


class MemoryQueries(nn.Module):
    """K vectors for every place, each with a look back of its own: h_t + O softmax((Q h_t + r_k) . K h_s) V h_s over
    s <= t. r_k are learned; heads are as many as the encoder's.
    """

    def __init__(self, size: int, tokens: int, heads: int):
        super().__init__()
        self.places = nn.Parameter(torch.empty(tokens, size))
        self.heads = (heads, size // heads)
        self.query_proj = nn.Linear(size, size, bias=False)
        self.key_value_proj = nn.Linear(size, 2 * size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, D) to (N, T, K, D); with a mask (N, T) of what is real the last place alone, (N, 1, K, D)."""
        asking = x if mask is None else x[:, -1:]
        queries = self.query_proj(asking)[:, :, None] + self.places
        if mask is None:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            seen = seen.repeat_interleave(len(self.places), 0)
        else:
            seen = mask.bool()[:, None, None]
        k, v = self.key_value_proj(x).unflatten(-1, (2, *self.heads)).permute(2, 0, 3, 1, 4)
        q = queries.flatten(1, 2).unflatten(-1, self.heads).transpose(1, 2)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return asking[:, :, None] + self.out_proj(found).unflatten(1, queries.shape[1:3])


class SMTTeacher(PreTrainedModel):
    """Encoder of the past into a memory, decoder of the future from it ("Pretraining Recurrent Networks without
    Recurrence", 2026): m_t = E(x_..t), p(y_t..) = D(m_t, x_t+1..). Thrown away when the student is trained.

    Both are transformers' Llama (rotary positions, RMS norms, SwiGLU). The encoder reads [past; K learned registers]
    in both directions, its last K outputs are the memory; the decoder reads [memory; future tokens] causally. With
    `all_positions` the encoder is causal, and the memory at t a map of its outputs up to there.
    """

    config_class = SMTTeacherConfig
    base_model_prefix = "teacher"
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config: SMTTeacherConfig):
        super().__init__(config)
        size, tokens = config.hidden_size, config.num_memory_tokens
        self.encoder = LlamaModel(config.transformer(config.encoder_layers, is_causal=config.all_positions))
        if config.decoder_layers:
            self.decoder = LlamaModel(config.transformer(config.decoder_layers, is_causal=True))
        if config.conv_kernel:
            self.conv = ShortConvolution(size, config.conv_kernel)
        if config.timestamps:
            self.timestamps = nn.Embedding(config.timestamps, size)
        if config.queries:
            self.queries = MemoryQueries(size, tokens, config.num_heads)
        if config.all_positions:
            self.to_memory = nn.Linear(size, tokens * config.memory_size)
        else:
            self.registers = nn.Parameter(torch.empty(tokens, size))
            self.to_memory = nn.Linear(size, config.memory_size)
        if config.decoder_layers:
            self.from_memory = nn.Linear(config.memory_size, size)
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initial_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, MemoryQueries):  # as long as what they are added to, so that they differ from the start
            init.normal_(module.places)
        elif isinstance(module, ShortConvolution):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            init.zeros_(module.bias)
        elif module is self and not self.config.all_positions:
            init.normal_(self.registers, std=self.config.initial_std)
        else:
            super()._init_weights(module)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The memory of a context, padded on the left, (N, C) and (N, C) to (N, K, D): vectors of length sqrt(D)."""
        x = self._embed(ids, mask)
        if self.config.all_positions:
            x = self.encoder(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
            return self._normalized(self.queries(x, mask) if self.config.queries else x[:, -1:])[:, 0]
        x = torch.cat([x, self.registers.expand(len(ids), -1, -1)], 1)
        mask = F.pad(mask, (0, len(self.registers)), value=True)
        x = self.encoder(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
        return self._normalized(x[:, ids.shape[1] :])

    def encode_all(self, ids: Tensor) -> Tensor:
        """The memories after each token, (B, T) to (B, T, K, D). Only with `all_positions`."""
        x = self.encoder(inputs_embeds=self._embed(ids)).last_hidden_state
        return self._normalized(self.queries(x) if self.config.queries else x)

    def _embed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.encoder.embed_tokens(ids)
        if self.config.timestamps:
            if ids.shape[1] > self.config.timestamps:
                raise ValueError(
                    f"timestamps: the teacher knows contexts of {self.config.timestamps} tokens, got {ids.shape[1]}"
                )
            position = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.timestamps(position if mask is None else (mask.cumsum(1) - 1).clamp(min=0))
        return self.conv(x, mask) if self.config.conv_kernel else x

    def _normalized(self, x: Tensor) -> Tensor:
        """Hidden states (N, T, W), of queries (N, T, K, W), to memories (N, T, K, D)."""
        if self.config.queries:
            weight = self.to_memory.weight.unflatten(0, (-1, self.config.memory_size))
            bias = self.to_memory.bias.unflatten(0, (-1, self.config.memory_size))
            tokens = (torch.einsum("ntkw,kdw->ntkd", x, weight) + bias).float()
        else:
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
        """A new teacher whose memories are the student's.

        Unless told otherwise its layers have at least as many parameters as the student, and it is no narrower than a
        memory token; with `all_positions` and less than K D channels its memory tokens have queries of their own.

        Args:
            settings: of an `SMTTeacherConfig`.
        """
        tokens, size = memory_shape(student)
        config = SMTTeacherConfig()
        heads, layers = settings.get("num_heads", config.num_heads), 0
        for name in ("encoder_layers", "decoder_layers"):
            layers += settings.get(name, getattr(config, name))
        width = settings.get("hidden_size")
        if width is None and heads > 0 and layers > 0:  # a layer has 12 width^2: 4 of attention, 8 of the feed-forward
            wanted = max(size, (sum(p.numel() for p in student.parameters()) / (12 * layers)) ** 0.5)
            width = 2 * heads * math.ceil(wanted / (2 * heads))
        if heads < 1 or width is None or width % (2 * heads):
            raise ValueError(
                "teacher_hidden_size, teacher_heads: expected a width of a multiple of twice the heads, got "
                f"{width} and {heads}"
            )
        queries = settings.get("all_positions", False) and width < tokens * size
        fitting = dict(vocab_size=student.config.vocab_size, num_memory_tokens=tokens, memory_size=size)
        return cls(SMTTeacherConfig(**dict(queries=queries) | settings | fitting | dict(hidden_size=width)))

    def check_fits(self, student: Any) -> None:
        """Raise ValueError where memories or vocabulary are not the student's."""
        mine = (self.config.vocab_size, self.config.num_memory_tokens, self.config.memory_size)
        theirs = (student.config.vocab_size, *memory_shape(student))
        if mine != theirs:
            raise ValueError(
                f"teacher: expected one for the student's vocabulary and memory (V, K, D) = {theirs}, got {mine}"
            )
