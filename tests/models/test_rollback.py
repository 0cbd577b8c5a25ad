"""Tokens taken back: the state before them, and decoding with candidates, which gives what decoding without gives."""

from functools import partial

import pytest
import torch
from conftest import LAYOUTS, layout_of
from transformers.generation.candidate_generator import CandidateGenerator

import hf_rnn
from hf_rnn.skeleton.versions import STATE

GREEDY = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)


def read(model, ids, state=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=state, use_cache=True, **options).cache


def assert_close(state, other):
    assert state.seen_tokens == other.seen_tokens
    for layer, others in zip(state.states, other.states, strict=True):
        for a, b in zip(layer, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [[17], [4, 1, 1, 11], [14, 1, 1, 1]], ids=str)
def test_tokens_taken_back(model, ids, pieces):
    """Read in pieces of any length, with padding among them, then back by any number of tokens and on."""
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 12] = 0, 0
    state = model.new_cache()
    state.activate_past_recording()
    start = 0
    for piece in pieces:
        stop = start + piece
        read(model, ids[:, start:stop], state, attention_mask=mask[:, start:stop])
        start = stop
    whole = read(model, ids, attention_mask=mask)
    assert_close(state, whole)
    for count in (0, 1, 5, 16):
        other = state.clone()
        other.crop(-count)
        assert_close(other, read(model, ids[:, : 17 - count], attention_mask=mask[:, : 17 - count]))
        read(model, ids[:, 17 - count :], other, attention_mask=mask[:, 17 - count :])
        assert_close(other, whole)
        if count:
            other.crop(count)
            assert other.seen_tokens == 17 - count
    state.crop(17)
    assert state.seen_tokens == 0 and not state.is_initialized
    assert_close(read(model, ids, state, attention_mask=mask), whole)


def test_as_many_states_as_logits(model, ids):
    """A long prompt is not kept token by token: of `logits_to_keep` tokens the state before each."""
    state = model.new_cache()
    state.activate_past_recording()
    read(model, ids[:, :1], state)
    read(model, ids[:, 1:], state, logits_to_keep=3)
    _, (seen, states) = state.past.parts
    assert seen == 14 and all(x.shape[:2] == (3, 4) for layer in states for x in layer)
    other = state.clone()
    other.crop(3)
    assert_close(other, read(model, ids[:, :14]))
    for count in (4, 16):
        with pytest.raises(ValueError, match=f"the state before the last {count} tokens is not recorded"):
            state.crop(count)
    assert state.seen_tokens == 17
    state.stop_past_recording()
    with pytest.raises(ValueError, match="activate_past_recording"):
        state.crop(1)
    state.crop(0)


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_recording_and_packing(model, ids):
    state = model.new_cache()
    state.activate_past_recording()
    with pytest.raises(ValueError, match="cache: packed sequences are not recorded"):
        model(ids, past_key_values=state, position_ids=torch.arange(17)[None] % 9)
    rows, packed = torch.randn(2, 5, 4), torch.randn(1, 10, 4)
    for x, layout, message in (
        (rows, layout_of(rows)._replace(recorded=6), "rows of at least 6 tokens.*got 5"),
        (rows, layout_of(rows)._replace(recorded=2, reverse=True), "got reversed"),
        (packed, layout_of(packed, cu_seqlens=torch.tensor([0, 4, 10]))._replace(recorded=2), "got packed"),
    ):
        with pytest.raises(ValueError, match=f"layout.recorded: .*{message}"):
            hf_rnn.linear_scan(x, x, layout=layout)


def search(model, prompt, allowed, length, first):
    """The most likely text that is allowed token by token; where none is, one token back. `first` gives logits and the
    state behind the prompt, and of each text on the way."""
    text, tried, steps_back = [], [set()], 0
    state, logits = first(model, prompt)
    logits = [logits]
    while len(text) < length:
        choices = [token for token in allowed(text) if token not in tried[-1]]
        if choices:
            token = max(choices, key=lambda token: float(logits[-1][token]))
            tried[-1].add(token)
            text.append(token)
            tried.append(set())
            if state is None:
                logits.append(first(model, torch.cat([prompt, torch.tensor([text])], 1))[1])
            else:
                logits.append(model(torch.tensor([[token]]), past_key_values=state).logits[0, -1])
                kept = sum(1 if x[0] is None else x[0][0].shape[1] for _, x in state.past.parts)
                assert kept <= length + 2
        else:
            text.pop(), tried.pop(), logits.pop()
            steps_back += 1
            if state is not None:
                state.crop(1)
    return text, steps_back, state


@torch.no_grad()
def test_constrained_decoding_steps_back(model, ids):
    """Three of four tokens in any order, at last without the one that is most likely at first: behind it are dead ends
    alone, out of which two steps lead back."""
    wrong = int(model(ids[:1]).logits[0, -1, :4].argmax())

    def allowed(text):
        return [] if len(text) == 2 and wrong in text else [token for token in range(4) if token not in text]

    def anew(model, prompt):
        return None, model(prompt).logits[0, -1]

    def recorded(model, prompt):
        state = model.new_cache()
        state.activate_past_recording(3)
        return state, model(prompt, past_key_values=state, logits_to_keep=1).logits[0, -1]

    expected, steps, _ = search(model, ids[:1], allowed, 3, anew)
    text, again, state = search(model, ids[:1], allowed, 3, recorded)
    assert text == expected and steps == again > 3 and wrong not in text[:2]
    assert_close(state, read(model, torch.cat([ids[:1], torch.tensor([text])], 1)))
    state.crop(3)
    assert_close(state, read(model, ids[:1]))
    with pytest.raises(ValueError, match="the state before the last 2 tokens is not recorded"):
        state.crop(2)
    with pytest.raises(ValueError, match="tokens: expected at least 0, got -1"):
        state.activate_past_recording(-1)


class Random(CandidateGenerator):
    """The tokens that greedy decoding will give, some of them replaced: any number is accepted, also none."""

    requires_model_outputs = False

    def __init__(self, text, seed):
        self.text, self.generator = text, torch.Generator().manual_seed(seed)

    def get_candidates(self, input_ids, *args, **kwargs):
        start, count = input_ids.shape[1], int(torch.randint(0, 7, (), generator=self.generator))
        candidates = self.text[:, start : min(start + count, self.text.shape[1] - 1)].clone()
        wrong = torch.rand(candidates.shape, generator=self.generator) < 0.25
        return torch.cat([input_ids, (candidates + wrong.long()) % 58], 1), None

    def update_candidate_strategy(self, *args, **kwargs):
        pass


def give(candidates, **kwargs):
    return candidates


@pytest.mark.parametrize("begun", [0, 9])
def test_random_rejections(model, ids, begun, monkeypatch):
    """The same tokens, and the state after the last but one of them, recording no longer."""
    ids = ids[:1]
    expected = model.generate(ids, **GREEDY)
    for seed in range(2):
        monkeypatch.setattr(type(model), "_get_candidate_generator", partial(give, Random(expected, seed)))
        state = read(model, ids[:, :begun]) if begun else None
        options = GREEDY | dict(prompt_lookup_num_tokens=2, return_dict_in_generate=True, past_key_values=state)
        output = model.generate(ids, **options)
        assert torch.equal(output.sequences, expected)
        state = output[STATE]
        assert not state.is_croppable and state.past is None
        assert_close(state, read(model, expected[:, :-1]))


DRAFT = {name: sorted(LAYOUTS)[n - 1] for n, name in enumerate(sorted(LAYOUTS))}


def test_a_draft_of_another_architecture(architecture, model, ids):
    config_class, model_class, _ = LAYOUTS[DRAFT[architecture]]
    torch.manual_seed(5)
    draft = model_class(config_class(vocab_size=61, hidden_size=8, num_hidden_layers=1, initializer_range=0.3)).eval()
    expected = model.generate(ids[:1], **GREEDY)
    for options in (dict(assistant_model=draft), dict(assistant_model=model), dict(prompt_lookup_num_tokens=5)):
        assert torch.equal(model.generate(ids[:1], **GREEDY, **options), expected)
    mask = torch.ones_like(ids[:1])
    mask[:, :5] = 0
    padded = dict(attention_mask=mask, **GREEDY)
    expected = model.generate(ids[:1], **padded)
    assert torch.equal(model.generate(ids[:1], assistant_model=draft, **padded), expected)
    few = dict(prefix_allowed_tokens_fn=lambda row, text: [3, 5, (int(text[-1]) + 1) % 58], **GREEDY)
    expected = model.generate(ids[:1], **few)
    assert torch.equal(model.generate(ids[:1], assistant_model=draft, **few), expected)


def test_a_draft_of_the_same_model_is_always_right(model, ids):
    """And the draft goes back as far as the other: with the same weights nothing is ever rejected."""
    reads = []
    draft_class = type(model)
    draft = draft_class(model.config).eval()
    draft.load_state_dict(model.state_dict())
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: reads.append(args[0].shape[1]), with_kwargs=True
    )
    expected = model.generate(ids[:1], **GREEDY | dict(max_new_tokens=18))
    reads.clear()
    tokens = model.generate(ids[:1], assistant_model=draft, **GREEDY | dict(max_new_tokens=18))
    hook.remove()
    assert torch.equal(tokens, expected) and reads == [17 + 5, 6, 6]


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_sampling_has_the_right_distribution(make_model):
    """Pairs of tokens by chi-square: a draft of another distribution changes nothing. 5 of 1,000 seeds would fail."""
    torch.manual_seed(0)
    tokens = dict(vocab_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model, (config_class, model_class, _) = make_model(**tokens), LAYOUTS["mingru"]
    draft = model_class(config_class(hidden_size=8, num_hidden_layers=1, initializer_range=0.3, **tokens)).eval()
    draft.generation_config.num_assistant_tokens = 2
    prompt, pairs, count = torch.tensor([[1, 3, 2]]), torch.cartesian_prod(torch.arange(4), torch.arange(4)), 250
    with torch.no_grad():
        texts = torch.cat([prompt.expand(16, -1), pairs], 1)
        p = model(texts).logits[:, 2:4].log_softmax(-1).gather(2, pairs[..., None]).sum((1, 2)).exp()
        q = draft(texts).logits[:, 2:4].log_softmax(-1).gather(2, pairs[..., None]).sum((1, 2)).exp()
    assert abs(float(p.sum()) - 1) < 1e-5
    options = dict(do_sample=True, max_new_tokens=4, top_k=0, assistant_model=draft)
    torch.manual_seed(1)
    drawn = torch.cat([model.generate(prompt, **options)[:, 3:5] for _ in range(count)])
    found = torch.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16)

    def chi_square(p):
        return float(((found - count * p) ** 2 / (count * p)).sum())

    assert chi_square(p) < 32.8 < chi_square(q), "15 degrees of freedom: 32.8 in 0.5% of draws"


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_what_decoding_with_candidates_refuses(model, ids):
    state, turn = read(model, ids[:1]), ids[:1, :4].flip(1)
    whole = torch.cat([ids[:1], turn], 1)
    options = dict(past_key_values=state, prompt_lookup_num_tokens=2)
    for tokens, mask in ((turn, torch.ones_like(whole)), (ids[:1], torch.ones_like(ids[:1]))):
        with pytest.raises(ValueError, match="input_ids: expected the whole text, the 17 tokens of the state"):
            model.generate(tokens, attention_mask=mask, **GREEDY, **options)
    expected = model.generate(whole, **GREEDY)[:, 21:]
    state.seen_tokens = 0
    assert torch.equal(model.generate(turn, **GREEDY, **options)[:, 4:], expected)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(ids, prompt_lookup_num_tokens=2, **GREEDY)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_generate_alone_records_nothing(model, ids):
    state = read(model, ids[:, :9])
    state.activate_past_recording()
    model.generate(ids, past_key_values=state, **GREEDY)
    assert state.past is None
