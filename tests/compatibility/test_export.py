"""A whole model as one program, by torch.export and ONNX: any batch and length, the state handed on, padding exact."""

import pytest
import torch
from conftest import make_head

from hf_rnn.exchange.export import StatefulModel, export_model, to_onnx


def small(name, head="ForCausalLM", **settings):
    """A model in which every part matters: one layer, odd sizes."""
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return make_head(name, head, **dict(vocab_size=31, hidden_size=12, num_hidden_layers=1) | tokens | settings)


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
        if whole.reads == "input_features":
            ids = torch.randn(batch, time, whole.example()[0].shape[2])
        for mask in padded(batch, time):
            states = whole.initial_states(batch)
            expected = whole(ids, mask, *states)
            close(run(ids, mask, *states), expected, mask, tolerance)
            if time > 1 and states and expected[0].dim() == 3:
                at = time // 3
                _, *between = run(ids[:, :at], mask[:, :at], *states)
                y, *last = run(ids[:, at:], mask[:, at:], *between)
                close([y, *last], [expected[0][:, at:], *expected[1:]], mask[:, at:], tolerance)


def close(found, expected, mask, tolerance):
    for x, y in zip(found, expected, strict=True):
        if y.shape[:2] == mask.shape:
            x, y = x[mask.bool()], y[mask.bool()]
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


KINDS = ["sliding_attention", "linear_attention"]
# Every way into ONNX; those whose time `make test` has none for are slow
SMALL = [
    ("lstm", "ForCausalLM", dict(num_heads=3, block_layout="paper", learned_initial_state=True)),
    ("gru", "ForSequenceClassification", dict(use_bias=False)),
    ("minlstm", "ForCausalLM", dict(layer_types=KINDS, num_hidden_layers=2, sliding_window=5, num_attention_heads=2)),
    ("xlstm", "ForCausalLM", dict(num_heads=2)),
    ("xlstm", "ForTokenClassification", dict(num_heads=2, bidirectional=True, block_layout="gated", slstm_at="all")),
    ("memoryrnn", "ForCausalLM", dict(num_memory_tokens=3)),
]
MORE = [
    ("lstm", "Model", dict(num_hidden_layers=2)),
    ("gru", "ForQuestionAnswering", dict(num_heads=2, bidirectional=True)),
    ("mingru", "ForCausalLM", dict(num_hidden_layers=2)),
    ("mingru", "ForMaskedLM", dict(bidirectional=True)),
    ("mingru", "ForCTC", dict(num_input_features=3, pad_token_id=0)),
    ("mingru", "ForTokenClassification", dict(num_input_features=3, patch_size=2, use_cache=False)),
    ("minlstm", "ForCausalLM", dict(normalize_gates=False, block_layout="paper")),
    ("xlstm", "ForCausalLM", dict(num_heads=2, num_hidden_layers=2, block_layout="neurips", slstm_at=[1])),
    ("xlstm", "ForMaskedLM", dict(num_heads=2, bidirectional=True)),
    ("memoryrnn", "ForQuestionAnswering", dict(updater="gru", bidirectional=True)),
]


@pytest.mark.parametrize("name, head, settings", SMALL[:1])  # the others, longer, among the slow tests
def test_onnx(name, head, settings, tmp_path):
    model = small(name, head, **settings)
    run = InOnnx(model, tmp_path / "x.onnx", padding=True)
    check(StatefulModel(model, padding=True), run, [(1, 1), (3, 17)])


@pytest.mark.slow
@pytest.mark.parametrize("name, head, settings", SMALL + MORE)
def test_long_sequences_in_onnx(name, head, settings, tmp_path):
    model = small(name, head, **settings)
    run = InOnnx(model, tmp_path / "x.onnx", padding=True)
    check(StatefulModel(model, padding=True), run, [(5, 1), (2, 130), (1, 2000)])


@torch.no_grad()
def test_without_padding(tmp_path):
    """No mask is taken, and the file says what it is of."""
    model, path = small("mingru"), tmp_path / "x.onnx"
    run, whole = InOnnx(model, path, padding=False), StatefulModel(model)
    assert run.names == whole.input_names == ["input_ids", "state_0", "state_1"]
    assert [x.name for x in run.session.get_outputs()] == ["logits", "new_state_0", "new_state_1"]
    told = run.session.get_modelmeta().custom_metadata_map
    assert told["model_type"] == "hf_rnn_mingru" and told["architecture"] == "MinGRUForCausalLM"
    inputs = torch.randint(0, 31, (2, 70)), *whole.initial_states(2)
    torch.testing.assert_close(run(*inputs), list(whole(*inputs)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_example_is_run_once(tmp_path):
    """A large model's forward pass takes its time."""
    pytest.importorskip("onnxscript")
    model, runs = small("mingru"), []
    model.register_forward_hook(lambda _, __, output: runs.append(type(output.logits) is torch.Tensor))
    to_onnx(model, tmp_path / "model.onnx")
    assert runs.count(True) == 1, "others are of shapes alone"


def test_padding_by_its_token():
    """A classifier finds it without a mask, and so the program does; its own example must have none."""
    model = small("mingru", "ForSequenceClassification", pad_token_id=0)
    whole, ids = StatefulModel(model), torch.randint(1, 31, (2, 9))
    ids[0, 4:] = 0
    found = export_model(model).module()(ids, *whole.initial_states(2))
    torch.testing.assert_close(found[0], model(ids).logits)


@torch.no_grad()
def test_a_program(tmp_path):
    """torch.export's, saved and loaded, for any batch and length."""
    model = small("lstm", num_heads=2)
    torch.export.save(export_model(model, padding=True), tmp_path / "x.pt2")
    program = torch.export.load(tmp_path / "x.pt2").module()
    check(StatefulModel(model, padding=True), program, [(1, 1), (3, 17)])


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "model: expected one of this package, got a Linear"),
        (lambda: small("gru").bfloat16(), ValueError, "model: expected float32, got .* in torch.bfloat16; model.float"),
        (
            lambda: small("lstm", block_layout="paper", projection_size=4, learned_initial_state=False),
            ValueError,
            "projection_size: expected none",
        ),
    ],
)
def test_what_does_not_export_says_so(make, error, words, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(error, match=words):
        to_onnx(make(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
