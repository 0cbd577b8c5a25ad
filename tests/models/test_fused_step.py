"""A token as one compiled call gives what the ordinary path gives, and leaves to that path what it does not know."""

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import LAYOUTS, relative_error
from torch import nn

import hf_rnn
from hf_rnn_kernels import fused_step, threads

pytestmark = pytest.mark.skipif(not threads.available(), reason="without numba there is the ordinary path alone")

# Beside tests/conftest.py's, every option that changes what a token computes
OPTIONS = {
    "lstm": [
        dict(block_layout="paper", num_heads=2),
        dict(residual=False, conv_kernel=0, output_projection=False, use_bias=False),
        dict(conv_kernel=0, num_heads=1, learned_initial_state=False, tie_word_embeddings=True),
    ],
    "gru": [dict(block_layout="paper", conv_kernel=2), dict(conv_kernel=3, expansion_factor=1.5, num_heads=3)],
    "mingru": [dict(block_layout="paper"), dict(use_g=True, use_bias=False)],
    "minlstm": [dict(block_layout="paper", use_g=True), dict(normalize_gates=False), dict(use_g=True)],
    "xlstm": [
        dict(block_layout="neurips", slstm_at=[1]),
        dict(block_layout="neurips", slstm_at="all", use_bias=True, conv_kernel=2),
        dict(block_layout="gated", slstm_at=[0], qkv_block_size=2),
        dict(gate_soft_cap=None, logit_soft_cap=None, qk_size=24, v_size=8, num_heads=2),
    ],
    "memoryrnn": [
        dict(updater="mlp", num_memory_tokens=3, updater_layers=3),
        dict(updater="gru", num_hidden_layers=2, use_bias=False),
    ],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{n}")
    for name in sorted(LAYOUTS)
    for n, options in enumerate([{}, *OPTIONS.get(name, [])])
    if name not in ("minlstm-attention",) and not (name == "memoryrnn" and n == 0)
]


def build(name: str, **options):
    config_class, model_class, _ = LAYOUTS[name]
    torch.manual_seed(0)
    settings = dict(vocab_size=61, hidden_size=48, num_hidden_layers=2, pad_token_id=58, bos_token_id=59)
    model = model_class(config_class(**settings | dict(eos_token_id=60) | options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "initial_state" in parameter_name or "bias" in parameter_name:
                parameter.normal_()
            elif "gate_proj.weight" in parameter_name or "recurrent_weight" in parameter_name:
                parameter.normal_(std=0.3)
            elif "updater.recurrent_proj" in parameter_name:
                parameter.mul_(0.5)  # or two paths of rounding part within a thousand tokens
    return model.eval()


@contextmanager
def ordinary(model):
    """A hook that does nothing but be there."""
    hook = model.model.register_forward_hook(lambda *_: None)
    assert model.decoding == "ordinary: hooks, or a forward of its own"
    yield model
    hook.remove()


@torch.no_grad()
def step(model, ids, state):
    return model(input_ids=ids, past_key_values=state, use_cache=True).logits


def prompt(batch, length=9):
    ids = torch.randint(0, 58, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(0, batch, 2):
        mask[row, : row % length] = 0
    return ids, mask


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_logits_and_states(name, options, batch):
    """A path each, then both the other way round: a text can go on by either."""
    model = build(name, **options)
    ids, mask = prompt(batch)
    with torch.no_grad():
        fused = model(ids, attention_mask=mask, use_cache=True).past_key_values
    plain, exact, double = copy.deepcopy(fused), copy.deepcopy(fused), copy.deepcopy(model).double()
    exact.states = [tuple(x.double() for x in state) for state in exact.states]
    assert model.decoding == "fused"
    for t in range(12):
        token = torch.randint(0, 58, (batch, 1), generator=torch.Generator().manual_seed(t))
        first, second = (fused, plain) if t < 8 else (plain, fused)
        logits = step(model, token, first)
        with ordinary(model):
            expected = step(model, token, second)
        assert logits.shape == expected.shape == (batch, 1, 61)
        reference = step(double, token, exact)
        assert relative_error(logits, reference) < max(1e-5, relative_error(expected, reference))
        assert fused.seen_tokens == plain.seen_tokens
        for a, b in zip(fused.states, plain.states, strict=True):
            assert all(relative_error(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("time", [2, 5, 19])
def test_several_tokens_of_one_text(name, options, time):
    """While a state records: logits and states as by one token after another."""
    model = build(name, **options)
    ids = torch.randint(0, 58, (1, 9 + time), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        state = model(ids[:, :9]).past_key_values
    other, exact, double = state.clone(), state.clone(), copy.deepcopy(model).double()
    exact.states = [tuple(x.double() for x in state) for state in exact.states]
    state.activate_past_recording()
    logits = step(model, ids[:, 9:], state)
    assert (time, True) in model.__dict__["_fused_step"].program.bound
    for t in range(time):
        expected = step(model, ids[:, 9 + t : 10 + t], other)
        reference = step(double, ids[:, 9 + t : 10 + t], exact)
        assert relative_error(logits[:, t : t + 1], reference) < max(1e-5, relative_error(expected, reference))
        back = state.clone()
        back.crop(time - 1 - t)
        assert back.seen_tokens == other.seen_tokens == 10 + t
        for a, b in zip(back.states, other.states, strict=True):
            assert all(x.is_contiguous() and relative_error(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


def generate(model, ids, mask, **options):
    torch.manual_seed(1)
    settings = dict(max_new_tokens=40, do_sample=False, eos_token_id=None) | options
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("name, options", [case for case in CASES if case.id.endswith("-0") or "memory" in case.id])
@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)], ids=str)
def test_the_same_tokens(name, options, how):
    model = build(name, **options)
    ids, mask = prompt(3)
    tokens = generate(model, ids, mask, **how)
    with ordinary(model):
        assert torch.equal(tokens, generate(model, ids, mask, **how))


@pytest.mark.slow
@pytest.mark.parametrize("name, options", CASES)
def test_the_same_thousand_tokens(name, options):
    model = build(name, **options)
    for batch in (1, 3, 64):
        ids, mask = prompt(batch)
        tokens = generate(model, ids, mask, max_new_tokens=1000)
        with ordinary(model):
            expected = generate(model, ids, mask, max_new_tokens=1000)
        others = (tokens != expected).any(1).nonzero().flatten().tolist()
        assert len(others) <= 3, "of 64,000 decisions between random logits a few may be ties"
        for row in others:
            at = int((tokens[row] != expected[row]).nonzero()[0])
            real = torch.cat([mask[row].bool(), mask.new_ones(at - ids.shape[1]).bool()])
            with torch.no_grad():
                logits = copy.deepcopy(model).double()(tokens[row, :at][real][None]).logits[0, -1]
            tie = (logits[tokens[row, at]] - logits[expected[row, at]]).abs() < 1e-5 * logits.std()
            # A network that magnifies rounding errors for hundreds of tokens: then float64 is with the fused step
            assert tie or logits.argmax() == tokens[row, at]


@pytest.mark.parametrize("name", ["lstm", "xlstm"])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_threads_of_a_step(name, batch, monkeypatch):
    """Several or one: the same."""
    model, before = build(name), torch.get_num_threads()
    ids, mask = prompt(batch)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            states = [model(ids, attention_mask=mask).past_key_values for _ in range(2)]
        alone = step(model, ids[:, :1], states[0])
        monkeypatch.setattr(fused_step, "SHARED_PRODUCTS", 0)
        assert torch.equal(step(model, ids[:, :1], states[1]), alone)
        pairs = [
            (x, y) for a, b in zip(*(state.states for state in states), strict=True) for x, y in zip(a, b, strict=True)
        ]
        assert all(torch.equal(x, y) for x, y in pairs)
    finally:
        torch.set_num_threads(before)


def assert_ordinary(model, reason):
    assert model.decoding.startswith(f"ordinary: {reason}"), model.decoding


@pytest.fixture
def small():
    return build("mingru", num_hidden_layers=1)


@pytest.fixture
def going_on(small):
    """A call of one more token from a fixed state, with whatever the model has become."""
    ids, mask = prompt(2)
    with torch.no_grad():
        state = small(ids, attention_mask=mask).past_key_values

    def run(model=small, **options):
        return model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(state), **options).logits

    with torch.no_grad():
        run()
    return run


def test_other_weights_are_seen(small, going_on):
    """Written in place, put in another place, another module."""
    for change in (
        lambda: small.lm_head.weight.mul_(2),
        lambda: setattr(small.lm_head.weight, "data", small.lm_head.weight.data * 2),
        lambda: setattr(small, "lm_head", copy.deepcopy(small.lm_head)),
        lambda: setattr(small.lm_head, "weight", nn.Parameter(small.lm_head.weight * 2)),
        lambda: small.load_state_dict({k: v * 1.5 for k, v in small.state_dict().items()}),
        lambda: small.model.layers[0].mixer.register_parameter("initial_state", None),
    ):
        with torch.no_grad():
            change()
            logits = going_on()
            assert small.decoding == "fused"
            with ordinary(small):
                assert relative_error(logits, going_on()) < 1e-6


def test_what_does_not_fit_takes_the_ordinary_path(small, going_on):
    """Nothing is read or written beyond what there is: parts of other sizes, states elsewhere."""
    with torch.no_grad():
        for name, part in (("lm_head", nn.Linear(48, 400)), ("lm_head", nn.Linear(48, 10)), ("norm", nn.RMSNorm(1))):
            other = copy.deepcopy(small)
            setattr(other if name == "lm_head" else other.model, name, part.eval())
            assert other.decoding.startswith("ordinary: "), name
            if name == "lm_head":
                assert going_on(other).shape == (2, 1, part.out_features)
        other = copy.deepcopy(small)
        other.lm_head = nn.Linear(64, 61).eval()
        with pytest.raises(RuntimeError):
            going_on(other)
        other = copy.deepcopy(small)
        other.model.embed_tokens = nn.Embedding(10, 48).eval()
        state = other(torch.tensor([[1, 2]])).past_key_values
        with pytest.raises(IndexError):
            other(input_ids=torch.tensor([[40]]), past_key_values=state)
        state = small(torch.tensor([[1, 2]])).past_key_values
        state.states = [tuple(x.to("meta") for x in layer) for layer in state.states]
        with pytest.raises(ValueError, match="expected on the device of x, cpu, got meta"):
            small(input_ids=torch.tensor([[40]]), past_key_values=state)


def test_settings_are_seen(small, going_on):
    """Of parts and of the config, changed between two tokens."""
    for change in (
        lambda: setattr(small.config, "use_g", not small.config.use_g),
        lambda: setattr(small.model.norm, "eps", 0.5),
        lambda: setattr(small.lm_head, "bias", nn.Parameter(torch.ones(61))),
        lambda: setattr(small.model.embed_tokens, "max_norm", 0.01),
        lambda: setattr(small, "logits", lambda x: small.lm_head(2 * x)),
    ):
        with torch.no_grad():
            before = going_on()
            change()
            logits = going_on()
            assert relative_error(logits, before) > 1e-4
            hook = small.model.register_forward_hook(lambda *_: None)
            assert relative_error(logits, going_on()) < 1e-6
            hook.remove()
    square = build(
        "mingru", num_hidden_layers=1, vocab_size=48, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    with torch.no_grad():
        state = square(torch.tensor([[1]])).past_key_values
        step(square, torch.tensor([[2]]), copy.deepcopy(state))
        square.lm_head.weight.data = square.lm_head.weight.data.t()  # as many numbers at the same place
        assert square.decoding.startswith("ordinary: weights")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(small, dtype):
    with torch.no_grad():
        state = small(torch.tensor([[1, 2]])).past_key_values
        expected = step(small, torch.tensor([[3]]), copy.deepcopy(state))
        torch.set_default_dtype(dtype)
        try:
            logits = step(small, torch.tensor([[3]]), state)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(logits, expected)


def test_autograd_is_told_of_the_state(small):
    with torch.no_grad():
        state = small(torch.tensor([[1, 2]])).past_key_values
    shared = copy.copy(state)
    shared.states = list(state.states)
    loss = small(torch.tensor([[3, 4]]), past_key_values=shared).logits.sum()
    step(small, torch.tensor([[5]]), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decoding_says_what_runs(small):
    assert small.decoding == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert_ordinary(small, "autocast")
    small.config.output_hidden_states = True
    assert_ordinary(small, "config.output_hidden_states")
    small.config.output_hidden_states = False
    assert_ordinary(small.train(), "training mode")
    assert small.eval().decoding == "fused"


def test_copies_have_their_own(small, going_on):
    with torch.no_grad():
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            other.lm_head.weight.mul_(3)
            torch.testing.assert_close(going_on(other), 3 * going_on(), rtol=1e-5, atol=1e-5)


def test_what_takes_the_ordinary_path(small, going_on):
    with torch.no_grad():
        expected = going_on()
    going_on().sum().backward()  # with gradients
    assert small.lm_head.weight.grad is not None
    with torch.no_grad():
        assert going_on(output_hidden_states=True).equal(going_on(output_hidden_states=True))
        assert small.decoding == "fused", "transformers' hooks, which stay, change nothing"
        with torch.autocast("cpu", torch.bfloat16):
            assert going_on().dtype == torch.bfloat16
        other = copy.deepcopy(small).double()
        assert_ordinary(other, "weights in torch.float64")
        other = copy.deepcopy(small)
        nn.utils.parametrizations.weight_norm(other.model.layers[0].mixer.out_proj)
        assert_ordinary(other, "a ParametrizedLinear")
        assert relative_error(going_on(other), expected) < 1e-5
        other = copy.deepcopy(small)
        other.lm_head.forward = lambda x: x[..., :3]
        assert_ordinary(other, "hooks")
        assert going_on(other).shape == (2, 1, 3)

        class Own(type(small.model.layers[0].mixer)):
            def _output(self, h, x):
                return 0 * super()._output(h, x)

        other = copy.deepcopy(small)
        other.model.layers[0].mixer.__class__ = Own
        assert_ordinary(other, "a Own of ")
        other = build("mingru", num_hidden_layers=1, hidden_dropout=0.5).train()
        assert relative_error(going_on(other), going_on(other)) > 0.01, "dropout draws anew"
        seen = []
        with_global = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        going_on()
        with_global.remove()
        assert seen


def test_adapters_that_are_not_merged(small, going_on):
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        expected = going_on()
    config = peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False)
    other = peft.get_peft_model(copy.deepcopy(small), config)
    assert_ordinary(other.base_model.model, "a Linear of peft")
    with torch.no_grad():
        assert relative_error(going_on(other), expected) > 1e-3
        merged = other.merge_and_unload()
        assert merged.decoding == "fused"
        logits = going_on(merged)
        with ordinary(merged):
            assert relative_error(logits, going_on(merged)) < 1e-6


def test_bad_input(small, going_on):
    ids, state = torch.tensor([[61]]), small(torch.tensor([[1]])).past_key_values
    with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids: expected ids in \[0, 61\).*got 61"):
        small(input_ids=ids, past_key_values=state)
    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected the state of a batch of 2"):
        small(input_ids=ids.expand(2, 1) - 1, past_key_values=state)
    with torch.no_grad(), pytest.raises(TypeError, match="nonsense"):
        small(input_ids=ids - 1, past_key_values=state, nonsense=1)


def test_several_threads_and_one_model():
    model = build("lstm")
    prompts = [prompt(batch) for batch in (1, 2, 5, 64)] * 2
    expected = [generate(model, *p) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda p: generate(model, *p), prompts))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork(small, going_on):
    with torch.no_grad():
        expected = going_on()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                same = relative_error(going_on(), expected) < 1e-5
            os._exit(
                0 if same and small.decoding.startswith("ordinary: numba is missing, or this process was forked") else 1
            )
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_the_state_of_another_kind(small, going_on):
    """A state that lies strided, or in bfloat16, or belongs to autograd is not written to by the compiled loop."""
    ids, mask = prompt(2)
    with torch.no_grad():
        state = small(ids, attention_mask=mask).past_key_values
        expected = step(small, ids[:, :1], copy.deepcopy(state))
        state.states = [tuple(x.repeat_interleave(2, -1)[..., ::2] for x in layer) for layer in state.states]
        assert relative_error(step(small, ids[:, :1], state), expected) < 1e-5


def test_the_memory_rnn_says_why():
    assert_ordinary(hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(vocab_size=11)), "updater='transformer'")
    assert_ordinary(build("minlstm-attention"), "a SlidingAttention")
