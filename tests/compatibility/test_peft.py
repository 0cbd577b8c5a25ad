"""PEFT's LoRA without target modules. With them: tests/models/test_transformers_stack.py."""

import copy

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn


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
