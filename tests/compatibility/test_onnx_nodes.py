"""Weights of ONNX's LSTM and GRU nodes both ways, against onnxruntime, which runs such nodes."""

import pytest
import torch
from conftest import relative_error
from torch import nn

import hf_rnn

CLASSES = {"LSTM": (nn.LSTM, hf_rnn.LSTMModel), "GRU": (nn.GRU, hf_rnn.GRUModel)}


def run_node(operator, x, W, R, B=None, **attributes):
    """Y (B, T, D * P) of x (B, T, I), by onnxruntime."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    inputs = {"X": x.transpose(0, 1), "W": W, "R": R} | ({} if B is None else {"B": B})
    direction = ["forward", "bidirectional"][len(W) - 1]
    node = onnx.helper.make_node(
        operator, list(inputs), ["Y"], hidden_size=R.shape[2], direction=direction, **attributes
    )
    floats = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, floats, value.shape) for name, value in inputs.items()]
    output = onnx.helper.make_tensor_value_info("Y", floats, ["T", "D", "B", "P"])
    graph = onnx.helper.make_graph([node], "node", values, [output])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(y).permute(2, 0, 1, 3).flatten(2)


def node(operator, directions, bias, inputs=5, size=7):
    """W, R and B with numbers large enough that every gate matters, and the node's attributes."""
    torch.manual_seed(0)
    rows = {"LSTM": 4, "GRU": 3}[operator] * size
    weights = [torch.randn(directions, rows, inputs), torch.randn(directions, rows, size)]
    weights += [torch.randn(directions, 2 * rows)] if bias else []
    return weights, {"linear_before_reset": 1} if operator == "GRU" else {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("operator", CLASSES)
def test_a_node_becomes_a_model_and_a_model_a_node(operator, directions, bias):
    torch_class, model_class = CLASSES[operator]
    weights, attributes = node(operator, directions, bias)
    rnn = torch_class(5, 7, bias=bias, bidirectional=directions == 2)
    rnn.load_state_dict(hf_rnn.from_onnx_node(*weights, **attributes))
    x, model = torch.randn(3, 11, 5), model_class.from_torch(rnn)
    ours = model(inputs_embeds=x).last_hidden_state
    assert relative_error(ours, run_node(operator, x, *weights, **attributes)) <= 1e-6
    back = hf_rnn.to_onnx_node(model.to_torch())
    assert all(torch.equal(a, b) for a, b in zip(back, weights, strict=False)) and (back[2] is None) != bias


@pytest.mark.parametrize("operator", CLASSES)
def test_two_nodes_are_two_layers(operator):
    torch_class, model_class = CLASSES[operator]
    first, attributes = node(operator, 2, bias=True)
    second, _ = node(operator, 2, bias=True, inputs=14)
    rnn = torch_class(5, 7, 2, bidirectional=True)
    parts = [hf_rnn.from_onnx_node(*w, **attributes, layer=i) for i, w in enumerate((first, second))]
    rnn.load_state_dict(parts[0] | parts[1])
    x, model = torch.randn(3, 11, 5), model_class.from_torch(rnn)
    expected = run_node(operator, run_node(operator, x, *first, **attributes), *second, **attributes)
    assert relative_error(model(inputs_embeds=x).last_hidden_state, expected) <= 1e-6
    back = hf_rnn.to_onnx_node(model.to_torch(), layer=1)
    assert all(torch.equal(a, b) for a, b in zip(back, second, strict=True))


@pytest.mark.parametrize("operator", CLASSES)
def test_heads_are_a_dense_node(operator):
    model_class = CLASSES[operator][1]
    config = model_class.config_class(
        hidden_size=12, num_heads=3, num_hidden_layers=1, residual=False, conv_kernel=0, output_projection=False,
        initializer_range=0.5,
    )  # fmt: skip
    x, model = torch.randn(2, 9, 12), model_class(config)
    weights = hf_rnn.to_onnx_node(model.to_torch())
    attributes = {"linear_before_reset": 1} if operator == "GRU" else {}
    expected = run_node(operator, x, *weights, **attributes)
    assert relative_error(model(inputs_embeds=x).last_hidden_state, expected) <= 1e-6


def test_converted_weights_are_copies():
    weights, _ = node("LSTM", 2, bias=True)
    kept = [w.clone() for w in weights]
    rnn = nn.LSTM(5, 7, bidirectional=True)
    for part in hf_rnn.from_onnx_node(*weights).values():
        part.fill_(7)
    for part in hf_rnn.to_onnx_node(rnn):
        part.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))
    assert not any((p == 7).any() for p in rnn.parameters())


@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda: hf_rnn.from_onnx_node(*node("GRU", 1, True)[0]), "linear_before_reset: expected 1 of a GRU"),
        (lambda: hf_rnn.from_onnx_node(torch.zeros(1, 8, 3), torch.zeros(1, 4, 2)), r"R: .* got \(1, 4, 2\)"),
        (lambda: hf_rnn.from_onnx_node(torch.zeros(3, 8, 3), torch.zeros(3, 8, 2)), r"R: .* got \(3, 8, 2\)"),
        (lambda: hf_rnn.from_onnx_node(torch.zeros(8, 3), torch.zeros(8, 2)), r"R: .* got \(8, 2\)"),
        (lambda: hf_rnn.from_onnx_node(torch.zeros(1, 6, 3), torch.zeros(1, 8, 2)), r"W: expected shape \(1, 8, I\)"),
        (
            lambda: hf_rnn.from_onnx_node(torch.zeros(1, 8, 3), torch.zeros(1, 8, 2), torch.zeros(1, 8)),
            r"B: expected shape \(1, 16\), got \(1, 8\)",
        ),
        (lambda: hf_rnn.to_onnx_node(nn.LSTM(3, 4, proj_size=2)), "proj_size: .* expected 0, got 2"),
    ],
)
def test_what_is_refused(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()


def test_the_other_gru_is_another():
    """What is refused gives other numbers, not the same in another order."""
    weights, _ = node("GRU", 1, bias=True)
    x = torch.randn(2, 9, 5)
    one, other = (run_node("GRU", x, *weights, linear_before_reset=which) for which in (1, 0))
    assert relative_error(other, one) > 0.1
