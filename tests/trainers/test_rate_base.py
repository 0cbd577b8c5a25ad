"""The rate of a difference to a base."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_rnn import GRUConfig, GRUForCausalLM, RateConstrainedConfig, RateConstrainedTrainer
from hf_rnn.compression.checkpoint import compress
from hf_rnn_trainers.rate import RateSettings
from hf_rnn_trainers.rate.rate_step import shrink


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("hf_rnn_trainers.rate.rate_callback.draw_rate", lambda *_: None)


def train(folder, model, **settings) -> RateConstrainedTrainer:
    rows = np.random.default_rng(0).integers(0, 17, (64, 9)).cumsum(1) % 17
    data = Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
    common = dict(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    common |= dict(max_steps=10, learning_rate=1e-2, logging_steps=5)
    trainer = RateConstrainedTrainer(model, RateConstrainedConfig(**common | settings), train_dataset=data)
    trainer.train()
    return trainer


def test_a_difference_costs_bits_and_not_the_weights(tmp_path):
    """What the rate takes back is the base's weight bit for bit, and stays it; coded against the base it is next to
    nothing. Vectors train as ever."""
    tokens = dict(vocab_size=17, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = GRUForCausalLM(GRUConfig(hidden_size=16, num_hidden_layers=1, **tokens))
    model.save_pretrained(tmp_path / "base")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path / "run", model, rate_shrink=0.3, rate_warmup=0.0, rate_base=str(tmp_path / "base"))
    same = {name: float((p == base[name]).float().mean()) for name, p in model.named_parameters()}
    matrices = [share for name, share in same.items() if base[name].dim() > 1 and "norm" not in name]
    assert all(0.03 < share < 1 for share in matrices)
    assert any(share == 0 for name, share in same.items() if "norm" in name)
    constrained = trainer.rate._parameters
    count = sum(p.numel() for p in constrained.values())
    zeros = sum(same[name] * p.numel() for name, p in constrained.items()) / count
    logged = [entry["zeros"] for entry in trainer.state.log_history if "zeros" in entry]
    assert logged[-1] == pytest.approx(zeros)
    whole = compress(copy.deepcopy(model), step=2**-8).bits
    assert compress(model, step=2**-8, base=tmp_path / "base").bits < 0.8 * whole


def test_a_difference_has_no_norm_to_keep():
    """In float64, weight by weight; the other tensor keeps its norm."""
    w, other = torch.randn(200, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    expected, norm = w.sign() * (w.abs() - 0.05 * 0.7 * (w.abs() / 0.9 + 0.2) ** (0.7 - 1)).clamp(min=0), other.norm()
    shrink([w, other], [(0.7, 0.9), (0.7, 0.9)], [0.05, 0.05], 0.2, [False, True])
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-15)
    assert float(other.norm()) == pytest.approx(float(norm), rel=1e-12)


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="paper_preset.*rate_base"):
        RateSettings(paper_preset=True, rate_base="x")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(GRUForCausalLM(GRUConfig(hidden_size=16, num_hidden_layers=1)), peft.LoraConfig())
    with pytest.raises(ValueError, match="rate_base.*adapters"):
        train(tmp_path, model, rate_base=str(tmp_path))
