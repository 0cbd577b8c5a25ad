"""forward takes what it documents and what transformers passes to any model; anything else is refused by name."""

import ast
import inspect
import textwrap

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, LAYOUTS
from transformers import (
    GenerationMixin,
    TextClassificationPipeline,
    TextGenerationPipeline,
    Trainer,
    ZeroShotClassificationPipeline,
)
from transformers.utils import TransformersKwargs

from hf_rnn.skeleton.inputs import IGNORED

# What transformers passes to models of other kinds: with encoders, images or sound, experts, or attention in both
# directions. Passed to ours they are a mistake, and refused.
OF_OTHERS = {"decoder_attention_mask", "encoder_outputs", "is_causal", "mm_encoder_outputs", "mm_token_type_ids"}
OF_OTHERS |= {"output_router_logits"}

# Where they put what into the arguments of a language model, and of a classifier
OF_CAUSAL = [GenerationMixin, TextGenerationPipeline._forward, Trainer.compute_loss, Trainer.prediction_step]
OF_CLASSIFIERS = [TextClassificationPipeline._forward, ZeroShotClassificationPipeline._forward, Trainer.prediction_step]


def names_passed(sources: list) -> set[str]:
    """Names under which these functions pass something to a model."""
    names = set()
    for source in sources:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                holder = ast.unparse(target.value) if isinstance(target, ast.Subscript) else None
                if holder in {"model_inputs", "model_kwargs", "inputs", "kwargs"}:
                    names.add(getattr(target.slice, "value", None))
    return {name for name in names if isinstance(name, str)}


def is_refused(model, ids, name: str) -> bool:
    try:
        model(ids, **{name: object()})
    except Exception as error:  # of its value, most of them
        return f"{name}: no argument of forward" in str(error)
    return False


@pytest.mark.parametrize(
    "kind, names",
    [
        (1, names_passed(OF_CAUSAL) | set(TransformersKwargs.__annotations__)),
        (2, names_passed(OF_CLASSIFIERS)),  # and no num_items_in_batch: it says that it takes none
    ],
    ids=["causal", "classification"],
)
def test_every_name_that_transformers_passes_is_taken_or_belongs_to_other_models(kind, names, ids):
    config_class, model_class = ARCHITECTURES["mingru"][0], ARCHITECTURES["mingru"][kind]
    model = model_class(config_class(vocab_size=61, hidden_size=16, num_hidden_layers=1))
    assert "use_cache" in names and (kind == 2 or {"cache_position", "logits_to_keep", "num_items_in_batch"} <= names)
    refused = {name for name in names - OF_OTHERS if is_refused(model, ids, name)}
    assert not refused, (
        f"transformers {transformers.__version__} passes {sorted(refused)} to models: document them in forward, or add "
        "them to hf_rnn.skeleton.inputs.IGNORED if they mean nothing for a recurrent model, or to OF_OTHERS here"
    )
    assert all(is_refused(model, ids, name) for name in OF_OTHERS)


def test_unknown_arguments_are_refused_by_name(architecture, ids):
    config_class, *model_classes = LAYOUTS[architecture]
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
        prompt = model(ids[:, :9]).cache
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
