"""PEFT's LoRA without target modules, and on what is no linear layer. With them: models/test_transformers_stack.py."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import constants
from torch import nn

WRAPPED = {
    "embedding and head": dict(target_modules=["embed_tokens", "in_proj", "lm_head"]),
    "new tokens": dict(target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]}),
    "whole modules": dict(
        target_modules=["out_proj"], modules_to_save=["embed_tokens", "in_proj", "conv", "lm_head", "norm"]
    ),
}


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
@pytest.mark.parametrize("settings", WRAPPED.values(), ids=WRAPPED)
def test_what_peft_puts_in_the_place_of_modules(model, ids, settings):
    """Training, generation and the check of ids read nothing off a module that a user may wrap."""
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.CAUSAL_LM, **settings))
    assert torch.equal(adapted.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)
    with pytest.raises(IndexError, match=r"input_ids: expected ids in \[0, 61\)"):
        adapted(input_ids=ids + 61)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(grad is not None for grad in trained) and any(grad.any() for grad in trained)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_peft_that_is_imported_after_the_model_was_made(model, monkeypatch):
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(targets, model.config.model_type, raising=False)
    assert get_peft_model(model, LoraConfig(r=2, task_type=TaskType.CAUSAL_LM)).peft_config


def test_lora_without_target_modules(model, ids, tmp_path):
    """Every linear layer but the head is adapted; saved, loaded and merged, outputs are the same."""
    base = copy.deepcopy(model)
    linear = {name for name, x in model.named_modules() if type(x) is nn.Linear} - {"lm_head"}
    adapted = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.CAUSAL_LM))
    names = {name.removeprefix("base_model.model.") for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert {name.removesuffix(".lora_A") for name in names} == linear
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    logits = adapted.eval()(input_ids=ids).logits
    assert not torch.allclose(logits, base(ids).logits, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, logits, rtol=1e-4, atol=2e-4)
