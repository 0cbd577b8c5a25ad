"""MemoryRNN, and the protocol of memories: what the models hold is what the protocol says they hold."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_rnn
from hf_rnn_kernels import Perturbed

TOKENS = dict(vocab_size=31, hidden_size=16, pad_token_id=None, bos_token_id=None, eos_token_id=None)
BARE = dict(conv_kernel=0, residual=False, feed_forward_factor=0)
MODELS = {
    "transformer": ("MemoryRNN", dict(updater="transformer")),
    "mlp, two memories": ("MemoryRNN", dict(updater="mlp", num_hidden_layers=2)),
    "gru": ("MemoryRNN", dict(updater="gru", num_memory_tokens=3)),
    "LSTM": ("LSTM", dict(conv_kernel=0, num_hidden_layers=2)),
    "bare LSTM": ("LSTM", dict(num_hidden_layers=2, **BARE)),
    "GRU": ("GRU", dict(conv_kernel=0, expansion_factor=2)),
    "paper GRU": ("GRU", dict(block_layout="paper", conv_kernel=0)),
    "LSTM behind convolutions": ("LSTM", dict(expansion_factor=1, num_hidden_layers=2)),
    "sLSTM": ("XLSTM", dict(block_layout="neurips", slstm_at="all", num_hidden_layers=2)),
    "gated sLSTM": ("XLSTM", dict(block_layout="gated", slstm_at="all", inner_size=16)),
}


def make(name: str):
    stem, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(hf_rnn, f"{stem}Config")(**TOKENS, initializer_range=0.3, **settings)
    model = getattr(hf_rnn, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "initial_state" in parameter_name or "bias" in parameter_name:
                parameter.normal_()
    return model.double().eval()


def test_students_are_known_by_the_protocol():
    assert all(isinstance(make(name), hf_rnn.MemoryProtocol) for name in MODELS)
    assert not isinstance(torch.nn.Linear(2, 2), hf_rnn.MemoryProtocol)


@pytest.mark.parametrize("name", MODELS)
def test_protocol_is_the_forward_pass(name):
    """Step by step from `initial_memory`: the same logits as `forward`, and gradients of every parameter."""
    model, ids = make(name), torch.randint(0, 31, (3, 9))
    expected = model(ids).logits
    memory, logits = model.initial_memory(3), []
    assert memory.shape == (3, *model.memory_shape)
    for token in ids.unbind(1):
        before = memory.clone()
        memory, old = model.update_memory(memory, token), memory
        assert torch.equal(old, before)  # not written to
        logits.append(model.read_memory(memory, token))
    torch.testing.assert_close(torch.stack(logits, 1), expected)
    weight = torch.randn_like(expected)
    parameters = list(model.parameters())
    actual = torch.autograd.grad((torch.stack(logits, 1) * weight).sum(), parameters, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters, materialize_grads=True)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_memories_of_several_tokens_in_one_pass(name):
    """Values, with a graph and without, and gradients, of the given memory too; what is masked leaves a memory."""
    model, ids, lengths = make(name), torch.randint(0, 31, (3, 7)), torch.tensor([7, 4, 1])
    start = model.update_memory(model.initial_memory(3), ids[:, 0]).detach().requires_grad_()
    memory, stepwise = start, []
    for t, token in enumerate(ids.unbind(1)):
        memory = torch.where((t < lengths)[:, None, None], model.update_memory(memory, token), memory)
        stepwise.append(memory)
    expected, mask = torch.stack(stepwise, 1), torch.arange(7) < lengths[:, None]
    actual = model.update_memories(start, ids, mask)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.update_memories(start, ids, mask), expected)
        single = model.update_memories(start, ids[:, :1])
        torch.testing.assert_close(single, expected[:, :1])
        assert model.update_memories(start, ids[:, :0]).shape == (3, 0, *model.memory_shape)
    weight, leaves = torch.randn_like(expected), [start, *model.parameters()]
    found = [torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True) for y in (actual, expected)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["bare LSTM", "gated sLSTM", "mlp, two memories"])
def test_memories_by_the_compiled_loops(name):
    """In float32, where they compute."""
    model, ids = make(name).float(), torch.randint(0, 31, (3, 7))
    with torch.no_grad():
        memory, mask = model.initial_memory(3), torch.rand(3, 7) < 0.7
        found = model.update_memories(memory, ids, mask)
        for t, token in enumerate(ids.unbind(1)):
            memory = torch.where(mask[:, t, None, None], model.update_memory(memory, token), memory)
            torch.testing.assert_close(found[:, t], memory, rtol=1e-4, atol=1e-5)


def test_hooks_inside_an_updater_are_called():
    """They make it run step by step, instead of as one operator."""
    model, ids, calls = make("mlp, two memories"), torch.randint(0, 31, (2, 5)), []
    expected = model(ids).logits
    for module in (model.model.layers[0].mixer.updater, model.model.layers[1].mixer.updater.norms[0]):
        module.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(calls) == 10


@pytest.mark.parametrize("name", MODELS)
def test_every_memory_can_be_held(name):
    """What a teacher says is, as `to_memory` turns it, what the recurrence can come to and go on from."""
    model = make(name)
    tokens = torch.nn.functional.rms_norm(torch.randn(64, *model.memory_shape).double(), model.memory_shape[1:])
    memory = model.to_memory(tokens)
    for layer, states in zip(model.model.layers, model._split(memory), strict=True):
        kind = type(layer.mixer).__name__
        if kind == "Memory":
            torch.testing.assert_close(states[0].square().mean(-1), torch.ones_like(states[0][..., 0]))
        else:
            assert states[0].abs().max() < 1
        if "SLSTM" in kind:
            _, c, n, _, _ = states
            assert (n >= 1).all() and (c.abs() <= n).all()
    assert model.update_memory(memory, torch.zeros(64, dtype=torch.long)).isfinite().all()


def test_memory_tokens_have_one_length_and_only_they_reach_the_output():
    model, ids = make("transformer"), torch.randint(0, 31, (2, 5))
    state = model(ids, use_cache=True).past_key_values
    (memory,) = state[0]
    torch.testing.assert_close(memory.square().mean(-1), torch.ones_like(memory[..., 0]))
    logits = model.read_memory(memory, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(logits, model(ids).logits[:, -1])


def test_places_tell_memory_tokens_apart():
    """From the empty memory, all tokens of which are equal."""
    model = make("transformer")
    memory = model.update_memory(model.initial_memory(1), torch.tensor([3]))
    assert torch.pdist(memory[0]).min() > 0.1


@pytest.mark.parametrize(
    "stem, settings, message",
    [
        ("MinGRU", dict(conv_kernel=0), "MinGRU: nothing to gain"),
        ("MinLSTM", {}, "nothing to gain"),
        ("XLSTM", {}, "MLSTM: nothing to gain"),
        ("XLSTM", dict(block_layout="neurips", slstm_at=[0], num_hidden_layers=2), "nothing to gain"),
        ("LSTM", dict(block_layout="paper"), "conv_kernel: expected 0"),
        ("LSTM", {}, "states of one width .*expansion_factor=1"),
        ("GRU", dict(conv_kernel=0, layer_types=["sliding_attention"] * 3), "layer_types: .*recurrent layers alone"),
    ],
)
def test_who_cannot_be_trained_by_memories(stem, settings, message):
    model = getattr(hf_rnn, f"{stem}ForCausalLM")(getattr(hf_rnn, f"{stem}Config")(**TOKENS, **settings))
    with pytest.raises(ValueError, match=message):
        model.check_memories()
    assert not hasattr(model, "memory_shape"), "tools that look at every attribute pass it by"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(updater="lstm"), "updater: expected 'transformer', 'mlp' or 'gru'"),
        (dict(num_memory_tokens=0), "num_memory_tokens: expected at least 1"),
        (dict(hidden_size=30), "num_heads: expected a divisor"),
        (dict(feed_forward_factor=0), "feed_forward_factor"),
    ],
)
def test_config(settings, message):
    with pytest.raises(Exception, match=message):
        hf_rnn.MemoryRNNConfig(**settings)


def test_gradients_fade_over_time_but_start_neither_vanished_nor_exploded():
    """One step multiplies the gradient by about 0.9 in a new network."""
    torch.manual_seed(0)
    tokens = dict(TOKENS, hidden_size=64)
    model = hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**tokens, updater="mlp", num_memory_tokens=2))
    memory, memories = model.initial_memory(8), []
    for token in torch.randint(0, 31, (16, 8)):
        memory = model.update_memory(memory, token)
        memory.retain_grad()
        memories.append(memory)
    (memory * torch.randn_like(memory)).sum().backward()
    ratio = float(memories[0].grad.norm() / memories[-1].grad.norm()) ** (1 / 15)
    assert 0.7 < ratio < 1.1


def test_bfloat16(tmp_path):
    model = make("mlp, two memories").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 31, (2, 7))
    state = loaded(ids).past_key_values
    assert state[0][0].dtype == torch.float32
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["transformer", "mlp, two memories", "gru"])
def test_many_perturbed_copies_at_once(name):
    """As `ZOTrainer` evaluates them: every parameter, of every updater, each copy as if alone."""
    model, members, ids, new = make(name), 3, torch.randint(0, 31, (2, 7)), {}
    for parameter_name, p in model.named_parameters():
        if p.dim() > 1:
            left = 0.1 * torch.randn(members, p.shape[0], 1, dtype=p.dtype)
            new[parameter_name] = Perturbed.of_low_rank(p, left, torch.randn(members, p.shape[1], 1, dtype=p.dtype), 2)
        else:
            offset = 0.1 * torch.randn(members, *p.shape, dtype=p.dtype)
            new[parameter_name] = Perturbed.of_offset(p, lambda offset=offset: offset, members, 2)
    with torch.no_grad():
        actual = torch.func.functional_call(model, new, (ids.repeat(members, 1),)).logits
        for m in range(members):
            copy = {parameter_name: p.copies()[m] for parameter_name, p in new.items()}
            torch.testing.assert_close(
                actual[2 * m : 2 * m + 2], torch.func.functional_call(model, copy, (ids,)).logits
            )
