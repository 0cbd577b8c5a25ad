"""The skeleton every architecture shares: embedding -> blocks -> norm -> head.

An architecture gives what mixes tokens (a `Mixer`) and its config.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hf_rnn.generation.batching import ContinuousBatch, requests_of
from hf_rnn.generation.fused_step import FUSED_TOKENS, decode_fused, reason_not_fused
from hf_rnn.layers import (
    Bidirectional,
    CausalConv,
    ContinuousInput,
    FeedForward,
    Mixer,
    RecurrentMixer,
    RMSNorm,
    SlidingAttention,
)
from hf_rnn.layers.continuous_input import ends_inside_patch, real_patches
from hf_rnn.skeleton.block import RecurrentBlock
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.generation import RecurrentGenerationMixin
from hf_rnn.skeleton.inputs import (
    check_are_tensors,
    check_ids,
    check_inputs,
    check_known,
    check_reads_tokens,
    packed_offsets,
    padding_mask,
    state_of,
)
from hf_rnn.skeleton.memory import MemoryMixin
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn.skeleton.versions import STATE, BaseModelOutput, CausalLMOutput
from hf_rnn_kernels.fused_step.program import Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, blocks and final norm.

    Attributes:
        mixer_class: the architecture's recurrence; others than those in minGRU's blocks override `make_block`.
    """

    mixer_class: type[RecurrentMixer]

    def __init__(self, config: RecurrentConfig):
        config.validate()  # loading sets what it is told beside the file's
        super().__init__(config)
        if config.num_input_features is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size)
        else:
            self.embed_features = ContinuousInput(
                config.num_input_features, config.input_size, config.patch_size, config.patch_intermediate_size
            )
        norm = self.make_norm(config)
        self.dropout = nn.Dropout(0.0 if norm is None else config.hidden_dropout)
        self.layers = nn.ModuleList(self.make_block(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm or nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def make_norm(self, config: Any) -> nn.Module | None:
        """The norm of the residual stream in front of a branch or the head; None where there is no such stream."""
        return RMSNorm(config.hidden_size, eps=config.norm_eps) if config.residual else None

    def make_block(self, config: Any, layer_idx: int) -> RecurrentBlock:
        """The blocks of `RecurrentBlockConfig`."""
        size, inner = config.hidden_size, int(config.hidden_size * config.feed_forward_factor)
        conv = None
        if config.conv_kernel and not config.is_gated:
            conv = self.directions(lambda: CausalConv(size, config.conv_kernel))
        dropped = config.residual or layer_idx < config.num_hidden_layers - 1
        return RecurrentBlock(
            layer_idx,
            self.directions(lambda: self.make_mixer(config, layer_idx), config.directions_side_by_side),
            self.make_norm(config),
            conv,
            self.make_norm(config) if inner else None,
            FeedForward(size, inner) if inner else None,
            config.hidden_dropout if dropped else 0.0,
        )

    def make_mixer(self, config: Any, layer_idx: int) -> Mixer:
        """What mixes tokens in this layer, in one direction."""
        if config.is_attention(layer_idx):
            return SlidingAttention(config)
        return self.mixer_class(config, config.hidden_size if layer_idx else config.input_size)

    def directions(self, make: Callable[[], nn.Module], side_by_side: bool = False) -> Any:
        """What `make` gives, or, in a bidirectional model, a `Bidirectional` of two."""
        if not self.config.bidirectional:
            return make()
        both = [make() for _ in range(1 if self.config.share_directions else 2)]
        return Bidirectional(both[0], both[-1] if len(both) > 1 else None, side_by_side)

    def get_input_embeddings(self) -> nn.Module:
        """What embeds: an `nn.Embedding`, or a `ContinuousInput`."""
        return self.embed_tokens if self.config.num_input_features is None else self.embed_features

    def set_input_embeddings(self, value: Any) -> None:
        if self.config.num_input_features is None:
            self.embed_tokens = value
        else:
            self.embed_features = value

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: RecurrentCache | None = None,
        input_features: torch.FloatTensor | None = None,
        observed_mask: Tensor | None = None,
        num_recorded: int = 0,
        **kwargs,
    ) -> BaseModelOutput:
        """Run the model.

        Args:
            input_ids: (B, T) tokens; or inputs_embeds, (B, T, config.input_size).
            input_features: (B, T, num_input_features) floating values, instead of tokens where the config has such.
                `config.patch_size` steps make one token, the last ones maybe fewer: what is said below of T tokens is
                of ceil(T / patch_size) then, but for attention_mask, which is of steps. Pieces with a state are of a
                multiple of patch_size steps.
            observed_mask: (B, T, num_input_features), zeros where a value is missing, whatever stands there.
            attention_mask: (B, T), or longer with the past in front; zeros at padding, on either side or in between,
                ones elsewhere. Padding changes neither the state nor any other token's output.
            position_ids: (B, T) or (1, T). A recurrent model needs no positions; a position 0 after the first token
                starts a new sequence, so that packed batches (`DataCollatorWithFlattening`) work; with a state to go on
                from, also at the first token, where it leaves that state behind. Not under a
                `torch.compile(fullgraph=True)`; `cu_seq_lens_q` is.
            cache, past_key_values: state to go on from, updated and returned; one argument under both the names that
                transformers has for it. Where sequences are packed it is each row's: its first sequence goes on from
                it, and the last leaves it.
            num_recorded: of how many of the last tokens a state that records (`activate_past_recording`) keeps the
                states before them; 0 for all.
            use_cache: return the state. Default: `config.use_cache`, but not in training nor for packed batches.
            kwargs: `cu_seq_lens_q` (N + 1) offsets of packed sequences in a batch of one, as the collator gives with
                `return_flash_attn_kwargs=True`, or `seq_idx` (1, T), the number of each token's sequence;
                `output_hidden_states`, `return_dict`. What `hf_rnn.skeleton.inputs.IGNORED` names means nothing here.

        Returns:
            `last_hidden_state` (B, T, hidden_size), `cache`, which is `past_key_values` as well, `hidden_states` if
            asked for.

        Raises:
            TypeError: an argument that is not known, or of another type.
            ValueError, IndexError: one of another shape or value than above; all are named in the message.
        """
        check_known(kwargs, "cu_seq_lens_q", "seq_idx")
        cache = state_of(cache, past_key_values)
        inputs = dict(input_ids=input_ids, input_features=input_features, inputs_embeds=inputs_embeds)
        check_are_tensors(attention_mask=attention_mask)
        check_inputs(self.config.num_input_features, **inputs, observed_mask=observed_mask)
        past, inside = 0 if cache is None else cache.get_seq_length(), False
        if input_features is not None:
            inputs_embeds, attention_mask, inside = self._embed(input_features, observed_mask, attention_mask, past)
        if input_ids is not None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids: expected shape (B, T), got {tuple(input_ids.shape)}")
            check_ids("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.input_size:
            raise ValueError(
                f"inputs_embeds: expected shape (B, T, {self.config.input_size}), got {tuple(inputs_embeds.shape)}"
            )
        batch, time = inputs_embeds.shape[:2]
        mask = padding_mask(attention_mask, batch, time, past)
        goes_on = isinstance(cache, RecurrentCache) and cache.is_initialized
        offsets, continues = packed_offsets(
            position_ids, kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), mask, batch, time, goes_on
        )
        cache = self._state(cache, use_cache, batch, packed=offsets is not None)
        if offsets is not None and cache is not None and cache.is_croppable:
            raise ValueError("cache: packed sequences are not recorded; stop_past_recording() first")
        recorded = 0 if cache is None else cache.record(time, num_recorded)
        in_place = offsets is None and cache is not None and cache.is_writable
        layout = SequenceLayout(mask, offsets, in_place, None if cache is None else continues, recorded=recorded)

        x = self.dropout(inputs_embeds) if self.training else inputs_embeds
        for layer in self.layers:
            x = layer(x, layout=layout, cache=cache)
        if cache is not None:
            cache.advance_by(time, self)
            cache.model_type = self.config.model_type
            cache.ends_inside_patch = inside
            if recorded:
                cache.record_each(recorded)
        return BaseModelOutput(last_hidden_state=self.norm(x), **{STATE: cache})  # type: ignore[arg-type]

    def _embed(
        self, x: Tensor, observed: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> tuple[Any, Tensor | None, bool]:
        """Features (B, T, F) and the mask of their steps as tokens (B, ceil(T / patch_size), D) and theirs, and whether
        they end inside a patch."""
        size = self.config.patch_size
        if x.dim() != 3 or x.shape[2] != self.config.num_input_features:
            raise ValueError(
                f"input_features: expected shape (B, T, {self.config.num_input_features}), got {tuple(x.shape)}"
            )
        mask = padding_mask(attention_mask, x.shape[0], x.shape[1], past * size)
        tokens = self.embed_features(x, observed, mask)
        if size == 1:
            return tokens, mask, False
        inside = ends_inside_patch(x.shape[1], mask, size)
        return tokens, None if mask is None else real_patches(mask, size), inside

    def _state(
        self, cache: RecurrentCache | None, use_cache: bool | None, batch: int, packed: bool
    ) -> RecurrentCache | None:
        """The state to go on from, a fresh one, or None."""
        if self.config.bidirectional:
            if cache is not None or use_cache:
                raise ValueError(
                    "cache, use_cache: a bidirectional model has no state to go on from, since every output depends on "
                    "all tokens that follow; expected none"
                )
            return None
        # Without gradients nothing is computed twice, and a state can be carried: generate() in train mode
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None:
            if checkpointed and use_cache:
                raise ValueError("use_cache: gradient checkpointing drops the state; switch one of them off")
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training and not packed
            return RecurrentCache(len(self.layers)) if use_cache and not checkpointed else None
        if not isinstance(cache, RecurrentCache):
            raise TypeError(f"cache: expected a RecurrentCache, got {type(cache).__name__}")
        if checkpointed:
            raise ValueError("cache: gradient checkpointing drops the state; switch one of them off")
        if cache.ends_inside_patch:
            raise ValueError(
                f"cache: the steps before it end inside a patch; expected pieces of a multiple of "
                f"{self.config.patch_size} steps (config.patch_size), from each row's first real one on"
            )
        if cache.model_type not in (None, self.config.model_type):
            raise ValueError(f"cache: expected the state of a {self.config.model_type}, got {cache.model_type}'s")
        if len(cache) != len(self.layers):
            raise ValueError(f"cache: expected the state of {len(self.layers)} layers, got one of {len(cache)}")
        if cache.batch_size not in (None, batch):
            raise ValueError(
                f"cache: expected the state of a batch of {batch}, as the input is, got one of {cache.batch_size}; "
                "select() and stack() give others"
            )
        for layer, state in zip(self.layers, cache.states, strict=True):
            expected = [(batch, *shape) for shape in layer.state_shapes]  # type: ignore[union-attr]
            if state is not None and [tuple(x.shape) for x in state] != expected:
                raise ValueError(
                    f"cache: expected states of shapes {expected}, got {[tuple(x.shape) for x in state]}; "
                    "a cache fits the model that made it"
                )
        return cache


class RecurrentForCausalLM(MemoryMixin, RecurrentPreTrainedModel, RecurrentGenerationMixin):
    """Language model: the backbone and a linear head. Its whole state as one tensor: see `MemoryMixin`.

    Attributes:
        model_class: the architecture's backbone.
        supports_perturbed: parameters may be `hf_rnn_kernels.Perturbed` of several members, and `model`, `logits` and
            the returned state work for each member's rows; by which `ZOTrainer` evaluates them together.
    """

    model_class: type[RecurrentModel]
    supports_perturbed = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RecurrentConfig):
        if config.bidirectional:
            raise ValueError(
                f"bidirectional: {type(self).__name__} predicts the next token, which a second direction has read; "
                "expected False, or a head for other tasks, such as ForMaskedLM or ForTokenClassification"
            )
        check_reads_tokens(config)
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def new_cache(self) -> RecurrentCache:
        """The state before the first token, which `forward` takes and goes on with."""
        return RecurrentCache(len(self.model.layers))

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) to (B, T, vocab_size)."""
        return self.lm_head(x)

    def fuse(self, program: Program) -> None:
        """A token of the whole model as instructions: embedding, blocks, norm and head."""
        x, states = program.embed(self.model.embed_tokens), iter(program.states)
        for layer in self.model.layers:
            layer.fuse(program, x, [next(states) for _ in layer.state_shapes])  # type: ignore
        self.fuse_logits(program, program.normalized(self.model.norm, x))

    def fuse_logits(self, program: Program, x: Vector) -> None:
        """As `logits`, into `program.logits`."""
        program.linear(self.lm_head, x, program.logits)

    @property
    def decoding(self) -> str:
        """How tokens after the prompt are computed: "fused", one compiled call each, or "ordinary: " and the reason."""
        reason = reason_not_fused(self)
        return f"ordinary: {reason}" if reason else "fused"

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        max_rows: int = 64,
        seed: int | None = None,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Continue many prompts of any lengths, as many at once as there are rows; who is done makes room for the next.

        Named and answered as transformers' continuous batching, which holds keys and values and cannot run this model.
        Each text is what it would be alone: greedy ones are those of `generate()`.

        Args:
            inputs: prompts, lists of tokens.
            generation_config, kwargs: as `generate()`'s, of which `max_new_tokens`, `max_length`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `min_p`, `eos_token_id` and `num_return_sequences` are known.
            max_rows: texts at once.
            seed: text number n is drawn with seed + n; None: another one each time.
            progress_bar: show one, of texts.

        Returns:
            In the order of the prompts, `request_id` to transformers' `GenerationOutput` with `prompt_ids`,
            `generated_tokens`, the end token included, and their `logprobs`.

        Raises:
            ValueError, IndexError: a setting that is not known, an empty prompt, tokens outside the vocabulary.
        """
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if unknown := config.update(**kwargs):
            raise TypeError(f"generate_batch: unknown arguments {sorted(unknown)}")
        requests = requests_of(config, inputs, seed)
        training = self.training
        batch = ContinuousBatch(self.eval(), min(max_rows, max(len(requests), 1)))
        try:
            outputs = [
                GenerationOutput(f"req_{n}", prompt_ids=list(r.unread)) for n, r in enumerate(map(batch.add, requests))
            ]
            with tqdm(total=len(requests), disable=not progress_bar, unit="text") as bar:
                while batch.busy:
                    bar.update(sum(r.finish_reason is not None for r in batch.step()))
        finally:
            self.train(training)
        for output, request in zip(outputs, requests, strict=True):
            output.generated_tokens, output.logprobs = request.tokens, request.token_logprobs
            output.status = RequestStatus.FINISHED
            if request.finish_reason not in ("stop", "length"):
                output.status, output.error = RequestStatus.FAILED, request.finish_reason
        return {output.request_id: output for output in outputs}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: RecurrentCache | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Next-token logits, and the loss where there are labels.

        Args:
            labels: (B, T), usually the input_ids: they are shifted here. -100 is ignored.
            logits_to_keep: logits of the last so many positions, or of the positions in an index tensor; 0 for all.
            kwargs: `num_items_in_batch`, by which the summed loss is divided, and `shift_labels` (B, T), labels that
                are shifted already; what `RecurrentModel.forward` takes.
            others: see `RecurrentModel.forward`.

        Returns:
            `loss`, `logits` (B, T, vocab_size), `cache`, which is `past_key_values` as well, `hidden_states` if asked
            for.

        Raises:
            TypeError, ValueError, IndexError: see `RecurrentModel.forward`.
        """
        state = state_of(cache, past_key_values)
        short = (
            isinstance(input_ids, Tensor) and input_ids.dim() == 2
            and isinstance(logits_to_keep, int) and logits_to_keep >= 0
            and isinstance(state, RecurrentCache) and state.is_initialized
            and position_ids is None and inputs_embeds is None and labels is None and not kwargs
            and not self.config.output_hidden_states
            and input_ids.shape[1] <= (FUSED_TOKENS if state.is_croppable and input_ids.shape[0] == 1 else 1)
        )  # fmt: skip
        if (
            short
            and padding_mask(attention_mask, *input_ids.shape, state.seen_tokens) is None  # type: ignore
            and (logits := decode_fused(self, input_ids, state)) is not None  # type: ignore[arg-type]
        ):
            return CausalLMOutput(logits=logits[:, -logits_to_keep:], **{STATE: state})  # type: ignore
        if isinstance(state, RecurrentCache) and state.is_croppable and isinstance(logits_to_keep, int):
            kwargs["num_recorded"] = logits_to_keep
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=state,
            return_dict=True,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, ignore_index=-100)
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels: expected the shape (B, T) of the logits, {tuple(logits.shape[:2])} (all of them: "
                    f"logits_to_keep=0), got {tuple(labels.shape)}"
                )
            labels = labels.long()  # type: ignore[assignment]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{STATE: outputs.cache})
