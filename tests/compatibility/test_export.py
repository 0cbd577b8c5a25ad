"""A whole model as one program, by torch.export and ONNX: any batch and length, the state handed on, padding exact."""

import pytest
import torch
from conftest import LAYOUTS

from hf_rnn.exchange.export import StatefulModel, to_onnx


def small(name, head=1, **settings):
    """A model in which every part matters: one layer, odd sizes."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=12, num_hidden_layers=1, initializer_range=0.3, num_labels=5)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = LAYOUTS[name][head](LAYOUTS[name][0](**sizes | tokens | settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "initial_state" in parameter_name or "bias" in parameter_name:
                parameter.normal_()
    return model.eval()


class InOnnx:
    """An ONNX file that is called as the `StatefulModel` that it was."""

    def __init__(self, model, path, padding):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        to_onnx(model, path, padding=padding)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.names = [x.name for x in self.session.get_inputs()]

    def __call__(self, *tensors):
        given = {name: x.numpy() for name, x in zip(self.names, tensors, strict=True)}
        return [torch.from_numpy(x) for x in self.session.run(None, given)]


def padded(batch, time):
    """Masks: none, on the left, and anywhere, each row with a real token."""
    real, left = torch.ones(batch, time, dtype=torch.long), torch.ones(batch, time, dtype=torch.long)
    left[0, : time // 2] = 0
    anywhere = (torch.rand(batch, time) > 0.4).long()
    anywhere[:, time // 3] = 1
    return real, left, anywhere


@torch.no_grad()
def check(whole, run, shapes, tolerance=1e-4):
    """`run` gives what `whole` does, at real tokens; in one piece and, with the state handed on, in two."""
    for batch, time in shapes:
        ids = torch.randint(0, 31, (batch, time))
        for mask in padded(batch, time):
            states = whole.initial_states(batch)
            expected = whole(ids, mask, *states)
            close(run(ids, mask, *states), expected, mask, tolerance)
            if time > 1 and whole.has_states and expected[0].dim() == 3:
                at = time // 3
                _, *between = run(ids[:, :at], mask[:, :at], *states)
                y, *last = run(ids[:, at:], mask[:, at:], *between)
                close([y, *last], [expected[0][:, at:], *expected[1:]], mask[:, at:], tolerance)


def close(found, expected, mask, tolerance):
    for x, y in zip(found, expected, strict=True):
        if y.dim() == 3 and y.shape[:2] == mask.shape:
            x, y = x[mask.bool()], y[mask.bool()]
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


SMALL = [
    ("lstm", {}),
    ("lstm", dict(num_heads=3, block_layout="paper", learned_initial_state=True)),
    ("gru", {}),
    ("gru", dict(num_heads=2, use_bias=False)),
    ("mingru", {}),
    ("minlstm", dict(normalize_gates=False, block_layout="paper")),
]


@pytest.mark.parametrize("name, settings", SMALL)
def test_onnx(name, settings, tmp_path):
    model = small(name, **settings)
    check(StatefulModel(model), InOnnx(model, tmp_path / "x.onnx"), [(1, 1), (3, 17)])
