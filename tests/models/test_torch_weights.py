"""LSTM and GRU models are torch.nn's with the same weights, whichever way they are computed."""

import copy
import itertools

import pytest
import torch
from conftest import relative_error
from huggingface_hub.errors import StrictDataclassClassValidationError as Strict
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hf_rnn
from hf_rnn.exchange.gate_order import from_flashrnn, to_flashrnn
from hf_rnn.exchange.torch_nn import _factor
from hf_rnn_kernels import SequenceLayout
from hf_rnn_kernels.recurrent_scan import library

NETWORKS = {"gru": (nn.GRU, hf_rnn.GRUModel), "lstm": (nn.LSTM, hf_rnn.LSTMModel)}


@pytest.fixture(params=sorted(NETWORKS))
def network(request):
    return NETWORKS[request.param]


@pytest.fixture(params=["as it comes", "our op"])
def route(request, monkeypatch):
    """torch's own recurrence where the layer chooses it, and the op in its place."""
    if request.param == "our op":
        monkeypatch.setattr(library, "run", lambda *_: None)


def gradients(parameters, outputs, cotangents):
    return torch.autograd.grad(outputs, parameters, cotangents)


def counterparts(model, rnn):
    """The parameters of a model, in the order of torch.nn's."""
    kinds = {"weight_ih": "in_proj.weight", "weight_hh": "recurrent_weight", "weight_hr": "projection.weight"}
    kinds |= {"bias_ih": "in_proj.bias", "bias_hh": "recurrent_bias"}
    for name, _ in rnn.named_parameters():
        kind, layer = name.removesuffix("_reverse").rsplit("_l", 1)
        direction = ("backwards." if name.endswith("_reverse") else "forwards.") if rnn.bidirectional else ""
        yield model.get_parameter(f"layers.{layer}.mixer.{direction}{kinds[kind]}")


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("layers, time, bias", [(1, 1, True), (1, 4096, True), (2, 37, False), (3, 250, True)])
def test_equal_to_torch(network, layers, time, bias):
    torch_class, model_class = network
    torch.manual_seed(0)
    rnn = torch_class(20, 20, layers, batch_first=True, bias=bias)
    model = model_class.from_torch(rnn).train()
    x, grad = torch.randn(3, time, 20), torch.randn(3, time, 20)
    grad_last = torch.randn(layers, 3, 20)
    leaf, double = x.double().requires_grad_(), copy.deepcopy(rnn).double()
    expected, last = double(leaf)
    last = last[0] if isinstance(last, tuple) else last
    expected_grads = gradients([leaf, *double.parameters()], [expected, last], [grad.double(), grad_last.double()])
    ours = x.clone().requires_grad_()
    outputs = model(inputs_embeds=ours, use_cache=True)
    states = outputs.past_key_values.states
    assert relative_error(outputs.last_hidden_state, expected) <= 1e-6
    assert relative_error(torch.stack([s[0] for s in states]), last) <= 1e-6
    grads = gradients(
        [ours, *counterparts(model, rnn)], [outputs.last_hidden_state, *(s[0] for s in states)], [grad, *grad_last]
    )
    for x, y in zip(grads, expected_grads, strict=True):
        assert relative_error(x.reshape(y.shape), y) <= 1e-5


# What torch.nn's constructors take beside the input's 5 channels and the 7 of a state; LSTMs alone have proj_size
SHAPES = [
    dict(num_layers=layers, bidirectional=both, bias=bias, **projected)
    for layers, bias in ((1, True), (2, False), (3, True))
    for both in (False, True)
    for projected in ({}, dict(proj_size=3))
]


def of_every_shape(network):
    torch_class, model_class = network
    for shape in SHAPES:
        if torch_class is nn.LSTM or "proj_size" not in shape:
            torch.manual_seed(0)
            rnn = torch_class(5, 7, batch_first=True, **shape)
            yield rnn, model_class.from_torch(rnn)


LENGTHS = torch.tensor([9, 31, 1, 17])
MASK = torch.arange(31) < LENGTHS[:, None]


def packed(rnn, x):
    """Padded outputs of torch.nn's packed sequences, and last states of all layers and directions."""
    y, last = rnn(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(y, batch_first=True)[0], last if isinstance(last, tuple) else (last,)


@pytest.mark.usefixtures("route")
def test_every_shape_of_torchs_is_ours(network):
    """Whole rows, padded ones and packed ones, outputs and gradients, against torch.nn's in float64."""
    for rnn, model in of_every_shape(network):
        x, double = torch.randn(4, 31, 5), copy.deepcopy(rnn).double()
        leaf, ours = x.double().requires_grad_(), x.clone().requires_grad_()
        whole, real = double(leaf)[0].flatten(0, 1), packed(double, leaf)[0][MASK]
        assert model.config.hidden_size == whole.shape[1] and model.config.input_size == 5
        for outputs, expected in (
            (model(inputs_embeds=ours).last_hidden_state.flatten(0, 1), whole),
            (model(inputs_embeds=ours, attention_mask=MASK).last_hidden_state[MASK], real),
            (model(inputs_embeds=ours[MASK][None], cu_seq_lens_q=OFFSETS).last_hidden_state[0], real),
        ):
            assert relative_error(outputs, expected) <= 1e-6, rnn
            grad = torch.randn_like(expected)
            expected_grads = torch.autograd.grad(expected, [leaf, *double.parameters()], grad, retain_graph=True)
            grads = gradients([ours, *counterparts(model, rnn)], outputs, grad.float())
            for a, b in zip(grads, expected_grads, strict=True):
                assert relative_error(a.reshape(b.shape), b) <= 1e-5, rnn


OFFSETS = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)])


def test_the_states_of_every_shape(network):
    """All layers' last states are torch.nn's; tokens one by one, and in pieces with padding before them, go on."""
    for rnn, model in of_every_shape(network):
        if model.config.bidirectional:
            continue
        x = torch.randn(4, 31, 5)
        last = packed(rnn, x)[1]
        state = model(inputs_embeds=x, attention_mask=MASK, use_cache=True).past_key_values
        for layer, states in enumerate(state.states):
            assert [s.shape for s in states] == [s[layer].shape for s in last]
            assert all(relative_error(ours, s[layer]) <= 1e-6 for ours, s in zip(states, last, strict=True)), rnn
        with torch.no_grad():
            state = model(inputs_embeds=x[:, :3], use_cache=True).past_key_values
            outputs = [model(inputs_embeds=x[:, t : t + 1], past_key_values=state).last_hidden_state for t in (3, 4)]
            left = torch.tensor([[1] * 5 + [0] * 4 + [1] * 26] * 4)  # the past, padding, and the rest
            rest = torch.cat([torch.randn(4, 4, 5), x[:, 5:]], 1)
            outputs += [model(inputs_embeds=rest, attention_mask=left, past_key_values=state).last_hidden_state[:, 4:]]
        assert relative_error(torch.cat(outputs, 1), rnn(x)[0][:, 3:]) <= 1e-6, rnn


def test_weights_of_every_shape_both_ways(network, tmp_path):
    for rnn, model in of_every_shape(network):
        back = model.to_torch()
        assert type(back) is type(rnn) and repr(back) == repr(rnn)
        assert back.state_dict().keys() == rnn.state_dict().keys()
        assert all(torch.equal(x, y) for x, y in zip(back.parameters(), rnn.parameters(), strict=True))
        model.save_pretrained(tmp_path)
        loaded, x = type(model).from_pretrained(tmp_path), torch.randn(2, 6, 5)
        assert torch.equal(loaded(inputs_embeds=x).last_hidden_state, model(inputs_embeds=x).last_hidden_state)


def test_one_set_of_weights_for_both_directions_is_two_in_torch(network):
    _, model_class = network
    for projected in ({}, dict(projection_size=6)) if network[0] is nn.LSTM else ({},):
        model = model_class(bare(model_class, bidirectional=True, share_directions=True, embedding_size=5, **projected))
        rnn, x = model.to_torch(), torch.randn(2, 9, 5)
        assert torch.equal(rnn.weight_ih_l0, rnn.weight_ih_l0_reverse)
        assert torch.equal(rnn.weight_hh_l1, rnn.weight_hh_l1_reverse)
        assert relative_error(model(inputs_embeds=x).last_hidden_state, rnn(x)[0]) <= 1e-6


def bare(model_class, **settings):
    """A config of bare recurrences; LSTMs' projected."""
    channels = dict(expansion_factor=1.5) if "projection_size" in settings else {}
    return model_class.config_class(
        hidden_size=12, num_hidden_layers=2, residual=False, conv_kernel=0, feed_forward_factor=0,
        output_projection=False, learned_initial_state=False, initializer_range=0.5, **channels, **settings,
    )  # fmt: skip


def test_factors_round_to_the_channels_they_are_of():
    for channels, width in itertools.product(range(1, 260), range(1, 260)):
        assert int(width * _factor(channels, width)) == channels
    for channels, width in ((49, 2**24), (2**24 - 1, 3), (10**6 + 3, 10**5 + 3)):
        assert int(width * _factor(channels, width)) == channels
    for both in (False, True):  # 15 / 11 * 11 and 15 / 22 * 22 are less than 15
        model = hf_rnn.LSTMModel.from_torch(nn.LSTM(3, 15, proj_size=11, bidirectional=both))
        assert model.config.inner_size == 15


def test_the_dtype_the_dropout_and_the_embedding_come_along(network):
    torch_class, model_class = network
    rnn = torch_class(12, 8, 3, dropout=0.1, bidirectional=True).double()
    embedding = nn.Embedding(31, 12)
    model = model_class.from_torch(rnn, embedding, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    assert model.config.vocab_size == 31 and model.dtype == torch.float64 and model.config.hidden_dropout == 0.1
    assert torch.equal(model.embed_tokens.weight, embedding.weight.double())
    back = model.to_torch()
    assert back.batch_first and back.dropout == 0.1 and back.weight_hh_l2_reverse.dtype == torch.float64
    ids = torch.arange(10).view(2, 5)
    assert relative_error(model.eval()(ids).last_hidden_state, back.eval()(embedding(ids).double())[0]) <= 1e-12


def test_heads_become_a_dense_matrix_with_zeros(network, tmp_path):
    _, model_class = network
    config = model_class.config_class(
        hidden_size=12, num_heads=3, residual=False, conv_kernel=0, feed_forward_factor=0, output_projection=False,
        num_hidden_layers=2, initializer_range=0.5,
    )  # fmt: skip
    model = model_class(config)
    with torch.no_grad():
        for mixer in model.mixers():
            mixer.recurrent_bias.normal_()
    x = torch.randn(2, 15, 12)
    assert relative_error(model(inputs_embeds=x).last_hidden_state, model.to_torch()(x)[0]) <= 1e-6
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs_embeds=x).last_hidden_state, model(inputs_embeds=x).last_hidden_state)


def test_flashrnn_both_ways(network):
    flashrnn = pytest.importorskip("flashrnn").flashrnn
    torch_class, model_class = network
    function = torch_class.__name__.lower()
    model = model_class(
        model_class.config_class(hidden_size=48, num_heads=3, num_hidden_layers=1, block_layout="paper")
    )
    mixer = model.mixers()[0]
    torch.nn.init.normal_(mixer.recurrent_bias)
    torch.nn.init.normal_(mixer.in_proj.bias)
    R, b = to_flashrnn(mixer)
    x = torch.randn(2, 11, 48)
    Wx = nn.functional.linear(x, mixer.in_proj.weight).view(2, 11, 3, -1, 16).transpose(2, 3)
    states, _ = flashrnn(Wx.contiguous(), R, b, function=function, backend="vanilla", dtype="float32")
    h, _ = mixer.recurrence(x, (None,) * mixer.num_states, SequenceLayout())
    assert relative_error(states[0].flatten(2), h) <= 1e-6
    again = from_flashrnn(function, R, b)
    assert torch.equal(again["recurrent_weight"], mixer.recurrent_weight)
    both = mixer.recurrent_bias + mixer.in_proj.bias
    torch.testing.assert_close(again["recurrent_bias"] + again["in_proj.bias"], both)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: hf_rnn.LSTMModel.from_torch(nn.GRU(8, 8)), TypeError, "expected a torch.nn.LSTM, got GRU"),
        (lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(8, 8), nn.Embedding(9, 4)), ValueError, "embedding: expected 8"),
        (lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(8, 8), num_heads=2), ValueError, "num_heads: not a choice"),
        (lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(8, 8), residual=True), ValueError, "residual: not a choice"),
        (
            lambda: hf_rnn.GRUModel.from_torch(nn.GRU(8, 8, bidirectional=True), share_directions=True),
            ValueError,
            "share_directions: not a choice",
        ),
        (
            lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(8, 8), projection_size=4),
            ValueError,
            "projection_size: not a choice",
        ),
        (lambda: hf_rnn.LSTMConfig(projection_size=8), Strict, "block_layout: expected 'paper' with projection_size"),
        (
            lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(4, 8), nn.Embedding(9, 8)),
            ValueError,
            "embedding: expected 4 wide, got 8",
        ),
        (
            lambda: hf_rnn.LSTMModel.from_torch(nn.LSTM(4, 8), nn.Embedding(9, 4), num_input_features=3),
            ValueError,
            "embedding: expected none with num_input_features",
        ),
        (lambda: hf_rnn.LSTMModel(hf_rnn.LSTMConfig(hidden_size=8)).to_torch(), ValueError, "residual=False"),
        (
            lambda: hf_rnn.LSTMConfig(hidden_size=8, num_heads=3, expansion_factor=1),
            Strict,
            "num_heads: expected a divisor of the 8",
        ),
        (lambda: hf_rnn.LSTMConfig(residual=False), Strict, "residual: without residuals set conv_kernel=0"),
        (lambda: from_flashrnn("elman", torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2)), ValueError, "function: expect"),
        (lambda: from_flashrnn("gru", torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2)), ValueError, "R: expected shape"),
        (lambda: from_flashrnn("gru", torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2)), ValueError, "b: expected shape"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_learned_initial_state_is_not_dropped():
    config = hf_rnn.GRUConfig(
        hidden_size=8, residual=False, conv_kernel=0, feed_forward_factor=0, output_projection=False
    )
    model = hf_rnn.GRUModel(config)
    model.to_torch()
    torch.nn.init.ones_(model.mixers()[0].initial_state)
    with pytest.raises(ValueError, match="no learned initial state"):
        model.to_torch()


@pytest.mark.parametrize("both", [False, True])
def test_dropout_is_between_the_layers(network, both):
    """As in torch.nn: not before the first, not after the last."""
    torch_class, model_class = network
    x = torch.randn(3, 40, 16)
    one = torch_class(16, 16, 1, batch_first=True, bidirectional=both)
    one.dropout = 0.9  # torch ignores it, with a warning if it is passed
    model = model_class.from_torch(one)
    assert model.training and relative_error(model(inputs_embeds=x).last_hidden_state, one(x)[0]) <= 1e-6
    two = torch_class(16, 16, 2, batch_first=True, dropout=0.9, bidirectional=both)
    model = model_class.from_torch(two)
    assert not (model(inputs_embeds=x).last_hidden_state == 0).any()
    torch.manual_seed(0)
    again = model(inputs_embeds=x).last_hidden_state
    assert not torch.allclose(again, model(inputs_embeds=x).last_hidden_state)
    assert not model_class.from_torch(two.eval()).training


def test_converted_weights_are_copies(network):
    _, model_class = network
    mixer = model_class(model_class.config_class(hidden_size=8, block_layout="paper")).mixers()[0]
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    R, b = to_flashrnn(mixer)
    pieces = from_flashrnn("lstm" if R.shape[0] == 4 else "gru", R, b)
    kept = R.clone(), b.clone()
    for piece in pieces.values():
        piece.fill_(7)
    assert torch.equal(R, kept[0]) and torch.equal(b, kept[1])
    R.fill_(7)
    b.fill_(7)
    assert all(torch.equal(p, before[name]) for name, p in mixer.named_parameters())


def test_flashrnn_without_biases(network):
    _, model_class = network
    mixer = model_class(model_class.config_class(hidden_size=8, block_layout="paper", use_bias=False)).mixers()[0]
    R, b = to_flashrnn(mixer)
    assert b.shape == (4, 1, 8) and not b.any() and R.shape[1:] == (1, 8, 8)


def test_an_embedding_and_its_padding():
    embedding = nn.Embedding(31, 8, padding_idx=3)
    config = hf_rnn.GRUModel.from_torch(nn.GRU(8, 8), embedding).config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (31, 3, None, None)


@pytest.mark.parametrize("how", ["forward hook", "pre-hook", "backward hook", "backward pre-hook", "forward replaced"])
def test_hooks_on_the_projection_are_called(how):
    mixer = hf_rnn.LSTMModel(hf_rnn.LSTMConfig(hidden_size=8, block_layout="paper")).mixers()[0]
    calls = []
    projection = mixer.in_proj
    if how == "forward replaced":  # as accelerate does
        original = projection.forward
        projection.forward = lambda x: (calls.append(1), original(x))[1]
    else:
        register = {
            "forward hook": projection.register_forward_hook,
            "pre-hook": projection.register_forward_pre_hook,
            "backward hook": projection.register_full_backward_hook,
            "backward pre-hook": projection.register_full_backward_pre_hook,
        }[how]
        register(lambda *_: calls.append(1))
    mixer(torch.randn(2, 5, 8, requires_grad=True), None, SequenceLayout())[0].sum().backward()
    assert calls


def test_autocast_and_an_empty_batch(monkeypatch):
    """Under autocast the op, whose state is not rounded."""
    mixer, x = (
        hf_rnn.LSTMModel(hf_rnn.LSTMConfig(hidden_size=8, block_layout="paper")).mixers()[0],
        torch.randn(2, 5, 8),
    )
    with torch.autocast("cpu", torch.bfloat16):
        h, state = mixer.recurrence(x, (None, None), SequenceLayout())
        monkeypatch.setattr(library, "run", lambda *_: None)
        expected, expected_state = mixer.recurrence(x, (None, None), SequenceLayout())
        monkeypatch.undo()
    assert h.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state)
    assert torch.equal(h, expected) and all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
    h, state = mixer.recurrence(torch.randn(0, 5, 8), (None, None), SequenceLayout())
    assert h.shape == (0, 5, 8) and state[0].shape == (0, 8)


@pytest.fixture
def projected():
    torch.manual_seed(0)
    return hf_rnn.LSTMModel.from_torch(nn.LSTM(5, 7, 2, proj_size=3)), torch.randn(3, 6, 5)


def test_a_projected_state_where_there_are_no_tokens(projected):
    model, x = projected
    assert model(inputs_embeds=x[:0]).last_hidden_state.shape == (0, 6, 3)
    assert model(inputs_embeds=x[:, :0]).last_hidden_state.shape == (3, 0, 3)
    mask = torch.tensor([[1] * 6, [0] * 6, [1, 0] * 3])
    outputs = model(inputs_embeds=x, attention_mask=mask, use_cache=True)
    assert not outputs.last_hidden_state[1].any() and not any(s[1].any() for s in outputs.past_key_values[1])
    alone = model(inputs_embeds=x[2:, ::2]).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state[2:, ::2], alone)
    gaps = model(inputs_embeds=x.view(1, 18, 5), cu_seq_lens_q=torch.tensor([0, 0, 6, 6, 18, 18])).last_hidden_state
    torch.testing.assert_close(gaps[:, :6], model(inputs_embeds=x[:1]).last_hidden_state)


def test_a_projected_state_is_not_rounded(projected):
    model, x = projected
    expected = model(inputs_embeds=x).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, expected)
    x, model = x.bfloat16(), model.bfloat16()
    h, (_, c) = model.mixers()[0](x, None, SequenceLayout())
    exact = model.float().mixers()[0](x.float(), None, SequenceLayout())[1][1]
    assert h.dtype == torch.bfloat16 and c.dtype == torch.float32 and relative_error(c, exact) <= 1e-6


@torch.no_grad()
def test_a_projected_state_stays_where_it_lies(projected):
    model, x = projected
    state = model(inputs_embeds=x[:, :3], use_cache=True).past_key_values
    before = [s.data_ptr() for layer in state.states for s in layer]
    y = model(inputs_embeds=x[:, 3:], past_key_values=state).last_hidden_state
    torch.testing.assert_close(y, model(inputs_embeds=x).last_hidden_state[:, 3:])
    assert before == [s.data_ptr() for layer in state.states for s in layer]


def test_a_projected_state_compiles(projected):
    model, x = projected
    mixer, layout = model.mixers()[0], SequenceLayout()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[:, :2], None, layout), mixer(x[:, :2], None, layout))


def test_an_adapter_on_the_projection_is_not_passed_by():
    """torch's LSTM takes the weights; an adapter's or a hook's part of the projection must not get lost."""
    model = hf_rnn.LSTMForCausalLM(hf_rnn.LSTMConfig(hidden_size=16, block_layout="paper")).eval()
    ids = torch.randint(0, 256, (2, 9))
    plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False))
    assert not torch.allclose(adapted(ids).logits, plain, atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids).logits, plain)
    with pytest.raises(ValueError, match="to_torch"):
        adapted.base_model.model.model.to_torch()
    merged = adapted.merge_and_unload()
    hook = merged.model.layers[0].mixer.in_proj.register_forward_hook(lambda module, inputs, output: output * 0)
    hooked = merged(ids).logits
    hook.remove()
    assert not torch.allclose(hooked, merged(ids).logits, atol=1e-3)


class Int8(torch.Tensor):
    """A matrix in int8 with a scale that looks like one of floats and knows one function, as torchao's are."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().max() / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.values.to(x.dtype) * weight.scale, *bias, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"{function}: no int8 kernel")


def test_a_quantized_projection_is_not_passed_by(network):
    """Prompt and single tokens, where torch's own recurrences would take its weight."""
    model = network[1](network[1].config_class(vocab_size=61, hidden_size=16)).eval()
    ids = torch.arange(18).view(2, 9)
    expected = model(ids, use_cache=False).last_hidden_state
    for mixer in model.mixers():
        weight = mixer.in_proj.weight.detach()
        mixer.in_proj.weight = nn.Parameter(Int8(weight), requires_grad=False)
        assert type(mixer.in_proj) is nn.Linear and mixer.in_proj.weight.dtype == torch.float32
    prompt = model(ids[:, :5], use_cache=True)
    outputs = [prompt.last_hidden_state]
    for token in ids[:, 5:].split(1, 1):
        outputs.append(model(token, past_key_values=prompt.past_key_values).last_hidden_state)
    h = torch.cat(outputs, 1)
    torch.testing.assert_close(h, model(ids, use_cache=False).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert 0 < relative_error(h, expected) < 0.05


def test_a_state_is_not_rounded_for_the_library(network):
    mixer = network[1](network[1].config_class(hidden_size=8, block_layout="paper")).bfloat16().mixers()[0]
    x, states = torch.randn(2, 5, 8).bfloat16(), [torch.randn(2, 8)] * mixer.num_states
    assert library.takes(x, []) and library.takes(x, [s.bfloat16() for s in states])
    assert not library.takes(x, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert not library.takes(x.float(), states)
    _, last = mixer(x, tuple(states), SequenceLayout())
    expected = mixer.double()(x.double(), tuple(states), SequenceLayout())[1]
    assert all(relative_error(a, b) < 1e-2 and a.dtype == torch.float32 for a, b in zip(last, expected, strict=True))
