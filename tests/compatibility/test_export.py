"""One decoding step as a graph, by torch.export and ONNX. Sequences: tests/models/test_transformers_stack.py."""

import pytest
import torch

from hf_rnn import LSTMConfig, LSTMForCausalLM
from hf_rnn.exchange.export import DecodingStep, export_step, to_onnx


def steps(run, ids, states):
    """Logits (B, T, V) of T calls, each with the states that the one before returned."""
    logits = []
    for t in range(ids.shape[1]):
        y, *states = run(ids[:, t : t + 1], *states)
        logits.append(torch.as_tensor(y))
    return torch.stack(logits, 1)


@torch.no_grad()
def test_decoding_step(model, ids, tmp_path):
    """The program, saved and loaded, says token by token what the model says at once."""
    torch.export.save(export_step(model, batch_size=3), tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    found = steps(program, ids, DecodingStep(model).initial_states(3))
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def in_onnx(model, path, ids):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    to_onnx(model, path, batch_size=len(ids))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    assert names[:2] == ["input_ids", "state_0"] and session.get_outputs()[0].name == "logits"

    def run(*tensors):
        return session.run(None, {name: torch.as_tensor(x).numpy() for name, x in zip(names, tensors, strict=True)})

    return steps(run, ids, DecodingStep(model).initial_states(len(ids)))


@pytest.mark.slow
def test_onnx(model, ids, tmp_path):
    torch.testing.assert_close(in_onnx(model, tmp_path / "x.onnx", ids), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_onnx_of_a_small_model(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, conv_kernel=0, feed_forward_factor=0, initializer_range=0.3)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=31, pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes))
    ids = torch.randint(0, 31, (1, 9))
    torch.testing.assert_close(in_onnx(model.eval(), tmp_path / "x.onnx", ids), model(ids).logits, rtol=1e-4, atol=1e-5)
