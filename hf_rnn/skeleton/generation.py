"""What generate() does with a recurrent state: goes on from one, leaves the caller's as it was, takes candidates back
that it rejects, compiles its step."""

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.inputs import state_of
from hf_rnn.skeleton.versions import STATE, STATE_NAMES, mask_length


class RecurrentGenerationMixin(GenerationMixin):
    """transformers' generate() for a model whose state is a `RecurrentCache`."""

    config: Any

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As transformers', with the state to go on from under either of its names.

        Raises:
            ValueError: an empty prompt; no new tokens after those of the state.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        embeds = kwargs.get("inputs_embeds")
        name, prompt = ("input_ids", ids) if embeds is None else ("inputs_embeds", embeds)
        if isinstance(prompt, Tensor) and prompt.dim() > 1 and prompt.shape[1] == 0:
            raise ValueError(
                f"{name}: expected at least one token, got shape {tuple(prompt.shape)}; a text of none begins with "
                "bos_token_id"
            )
        state = state_of(*(kwargs.pop(name, None) for name in STATE_NAMES))
        return super().generate(inputs, *args, **kwargs if state is None else kwargs | {STATE: state})

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        """As transformers', and with the state that a prompt goes on from in a wider copy, for beams and samples."""
        if expand_size > 1 and isinstance(kwargs.get(STATE), RecurrentCache):
            kwargs[STATE] = copy.deepcopy(kwargs[STATE])
            kwargs[STATE].batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, use_cache=None, position_ids=None, **kwargs
    ):
        """As transformers', without positions, which mean nothing here, and without the mask of generated tokens."""
        state, new = kwargs.get(STATE), kwargs.get("next_sequence_length")  # of the text; None: all of it
        whole = is_first_iteration and new is None and inputs_embeds is None
        if whole and state is not None and state.is_croppable:
            # Decoding with candidates begins with the whole text, also where a state has read some of it
            new = kwargs["next_sequence_length"] = input_ids.shape[1] - state.seen_tokens
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if new is not None and new < 1:
            time = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            raise ValueError(
                f"input_ids: expected the whole text, the {time - new} tokens of the state and at least one "
                f"more, got {time}; or new tokens alone and an attention_mask of the whole text, (B, {time - new} + T)"
            )
        if use_cache and not is_first_iteration and new in (None, 1):
            inputs.pop("attention_mask", None)
        return inputs

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        """As transformers', from a state, too; which records no longer when it is returned.

        Raises:
            ValueError: new tokens alone with a state, of which it would take some for those of the state.
        """
        state, config = kwargs[STATE], kwargs["generation_config"]
        given = mask_length(config, kwargs.get("attention_mask"), input_ids)
        if state.seen_tokens and not state.seen_tokens < input_ids.shape[1] == given:
            raise ValueError(
                f"input_ids: expected the whole text, the {state.seen_tokens} tokens of the state and at least one "
                "more, since candidates are tried; or a state with seen_tokens = 0"
            )
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            state.stop_past_recording()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As transformers', which leaves the state to the model; a prompt read in chunks and candidates want it
        beforehand."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache:
            model_kwargs.setdefault(STATE, RecurrentCache(self.config.num_hidden_layers))
            if generation_config.is_assistant:
                model_kwargs[STATE].activate_past_recording()
            else:
                model_kwargs[STATE].stop_past_recording()

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether generate() compiles its steps: if `compile_config` asks for it, on any device, since a step's shapes
        and addresses never change; what records grows, and is not compiled. transformers' own rule takes GPUs, and
        caches for which it makes masks."""
        asked = generation_config.compile_config is not None and not generation_config.disable_compile
        asked &= not getattr(model_kwargs.get(STATE), "is_croppable", False)
        devices = set((getattr(self, "hf_device_map", None) or {}).values())
        quantizer = getattr(self, "hf_quantizer", None)
        asked &= "disk" not in devices and (quantizer is None or quantizer.is_compileable)
        return asked and len(devices) <= 1 and bool(model_kwargs.get("use_cache"))
