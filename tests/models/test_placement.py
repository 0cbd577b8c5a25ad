"""Models that do not lie on one device as a whole: `device_map`, offloaded to disk, in parts over processes."""

import pytest
import torch
from launch import TESTS, launch
from transformers import AutoModelForCausalLM

from hf_rnn.skeleton.block import RecurrentBlock


@pytest.mark.parametrize("place", ["cpu", "disk", "auto"])
def test_device_map(place, make_model, ids, tmp_path):
    """Placed layer by layer, the middle ones on disk; logits and tokens, with the state carried, are the same."""
    model = make_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(3))]
    options: dict = {"device_map": "auto"}
    if place == "cpu":
        options = {"device_map": {"": "cpu"}}
    elif place == "disk":
        on_disk = ("model.layers.1", "lm_head")
        device_map = {name: "disk" if name in on_disk else "cpu" for name in names}
        options = {"device_map": device_map, "offload_folder": str(tmp_path / "disk")}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    if place == "disk":
        assert placed.hf_device_map == options["device_map"]
        assert all(p.device.type == "meta" for p in placed.model.layers[1].parameters())
    with torch.no_grad():  # not in every bit: torch's own LSTM takes no layer with hooks
        torch.testing.assert_close(placed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=58, eos_token_id=None)
    assert torch.equal(placed.generate(ids, **settings), model.generate(ids, **settings))


def test_auto_leaves_blocks_whole(make_model, tmp_path):
    """With room for two thirds of the model, "auto" puts whole blocks on disk and the model still says the same."""
    model = make_model(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size * 2 // 3}, offload_folder=str(tmp_path / "disk")
    )
    assert {"cpu", "disk"} <= set(map(str, placed.hf_device_map.values()))
    inside = [name for name in placed.hf_device_map if name.startswith("model.layers.")]
    assert inside and all(name.count(".") == 2 for name in inside)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(placed.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_blocks_are_what_is_not_split(model):
    assert set(model._no_split_modules) == {RecurrentBlock.__name__}
    assert all(isinstance(layer, RecurrentBlock) for layer in model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        ["lstm", "lstm-paper", "mingru", "minlstm-tied", "xlstm"],
        ["gru-bare", "gru-attention", "xlstm-bias", "xlstm-gated", "xlstm-neurips", "memory"],
    ],
    ids=["usual", "others"],
)
def test_tensor_parallel(cases, tmp_path):
    """In two processes by `tp_plan="auto"`: logits, tokens and gradients of the whole model."""
    launch(2, TESTS / "workers" / "tensor_parallel.py", tmp_path, *cases)
