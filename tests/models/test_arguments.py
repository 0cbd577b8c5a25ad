"""forward takes what it documents and what transformers passes to any model; anything else is refused by name."""

import ast
import inspect
import textwrap

import pytest
import torch
import transformers
from conftest import ARCHITECTURES
from transformers import (
    GenerationMixin,
    TextClassificationPipeline,
    TextGenerationPipeline,
    Trainer,
    ZeroShotClassificationPipeline,
)
from transformers.utils import TransformersKwargs

from hf_rnn.inputs import IGNORED

# What transformers passes to models of other kinds: with encoders, images or sound, experts, or attention in both
# directions. Passed to ours they are a mistake, and refused.
OF_OTHERS = {"decoder_attention_mask", "encoder_outputs", "is_causal", "mm_encoder_outputs", "mm_token_type_ids"}
OF_OTHERS |= {"output_router_logits"}

# Where they put what into a model's arguments
SOURCES = [GenerationMixin, Trainer.compute_loss, Trainer.prediction_step, TextClassificationPipeline._forward]
SOURCES += [TextGenerationPipeline._forward, ZeroShotClassificationPipeline._forward]


def names_passed() -> set[str]:
    """Names under which GenerationMixin, Trainer and the pipelines of text pass something to a model."""
    names = set(TransformersKwargs.__annotations__)
    for source in SOURCES:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                holder = ast.unparse(target.value) if isinstance(target, ast.Subscript) else None
                if holder in {"model_inputs", "model_kwargs", "inputs", "kwargs"}:
                    names.add(getattr(target.slice, "value", None))
    return {name for name in names if isinstance(name, str)}


@pytest.mark.parametrize("kind", [1, 2], ids=["causal", "classification"])
def test_every_name_that_transformers_passes_is_taken_or_belongs_to_other_models(kind):
    model_class = ARCHITECTURES["mingru"][kind]
    documented = set(inspect.signature(model_class.forward).parameters)
    documented |= {"cu_seq_lens_q", "seq_idx", "position_ids", "num_items_in_batch", "shift_labels", "logits_to_keep"}
    passed = names_passed()
    assert {"cache_position", "logits_to_keep", "num_items_in_batch", "use_cache"} <= passed  # the walk finds them
    unknown = passed - documented - IGNORED - OF_OTHERS
    assert not unknown, (
        f"transformers {transformers.__version__} passes {sorted(unknown)} to models: document them in forward, or add "
        "them to hf_rnn.inputs.IGNORED if they mean nothing for a recurrent model, or to OF_OTHERS here"
    )


def test_unknown_arguments_are_refused_by_name(architecture, ids):
    config_class, *model_classes = ARCHITECTURES[architecture]
    for model_class in (*model_classes, model_classes[0].model_class):
        model = model_class(config_class(vocab_size=61, hidden_size=16, num_hidden_layers=1))
        for name in ("past_key_value", "atention_mask", "is_causal", "encoder_outputs"):
            with pytest.raises(TypeError, match=f"^{name}: no argument of forward"):
                model(ids, **{name: True})
            model(ids, **{name: None})
        model(ids, **dict.fromkeys(IGNORED - {"return_dict", "output_hidden_states"}, 1))


def test_the_state_goes_in_and_out_under_both_names(model, ids):
    whole = model(ids).logits
    for name in ("cache", "past_key_values"):
        outputs = model(ids[:, :9])
        assert outputs.cache is outputs.past_key_values
        rest = model(ids[:, 9:], **{name: outputs.cache})
        torch.testing.assert_close(rest.logits, whole[:, 9:])
        prompt = model(ids[:, :-1]).cache
        options = dict(max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(ids, **{name: prompt}, **options), model.generate(ids, **options))
    with pytest.raises(ValueError, match="^cache, past_key_values: two names"):
        model(ids, cache=model(ids).cache, past_key_values=model(ids).cache)


def test_in_train_mode_with_gradient_checkpointing_generate_keeps_the_state(model, ids):
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    right = model.generate(ids, **options)
    state = model(ids).cache
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **options), right)
    with pytest.raises(ValueError, match="^cache: gradient checkpointing drops the state"):
        model(ids, cache=state)  # with gradients
    with pytest.raises(ValueError, match="^use_cache: gradient checkpointing drops the state"):
        model(ids, use_cache=True)
