"""TRL's SFTTrainer as it is."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_rnn import GRUConfig, GRUForCausalLM, XLSTMConfig, XLSTMForCausalLM, byte_tokenizer

trl = pytest.importorskip("trl")
TEXTS = Dataset.from_dict({"text": ["hello world " * 5, "a b c", "x" * 40, "yes no"] * 4})


def sft(model, folder, **settings):
    defaults = dict(max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, report_to="none", use_cpu=True)
    peft_config = settings.pop("peft_config", None)
    arguments = trl.SFTConfig(str(folder), save_strategy="no", disable_tqdm=True, **defaults | settings)
    return trl.SFTTrainer(
        model, arguments, train_dataset=TEXTS, processing_class=byte_tokenizer(), peft_config=peft_config
    )


@pytest.mark.parametrize("settings", [dict(), dict(packing=True, max_length=32)], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["gru", "xlstm"])
def test_sft(name, settings, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1)
    model = {
        "gru": lambda: GRUForCausalLM(GRUConfig(**sizes)),
        "xlstm": lambda: XLSTMForCausalLM(XLSTMConfig(**sizes)),
    }[name]()
    before = copy.deepcopy(model.state_dict())
    result = sft(model, tmp_path, **settings).train()
    assert 0 < result.training_loss < 7
    assert not torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_sft_with_lora(tmp_path):
    """Its own way to an adapter, told no targets; only the adapter is trained and saved."""
    model = GRUForCausalLM(GRUConfig(hidden_size=16, num_hidden_layers=1))
    trainer = sft(model, tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer.train()
    trainer.save_model()
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
