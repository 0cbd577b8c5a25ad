"""Continuous batching: every text is what it would be alone, whatever comes, goes, waits or is parked beside it."""

import copy
import random

import pytest
import torch
from scipy import stats

import hf_rnn
from hf_rnn import RecurrentCache
from hf_rnn.generation.batching import ContinuousBatch, Request, Sampling

LAYOUTS = {name: {} for name in hf_rnn.ARCHITECTURES}
LAYOUTS["MinGRU"] = dict(layer_types=["linear_attention", "sliding_attention"], sliding_window=5, num_attention_heads=2)


@pytest.fixture(scope="module", params=hf_rnn.ARCHITECTURES)
def model(request):
    """In float64, in which texts do not part by rounding."""
    torch.manual_seed(0)
    config = getattr(hf_rnn, f"{request.param}Config")(
        hidden_size=16, num_hidden_layers=2, vocab_size=40, pad_token_id=None, **LAYOUTS[request.param]
    )
    model = getattr(hf_rnn, f"{request.param}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prompts(count, longest=20, seed=0):
    chance = random.Random(seed)
    return [[chance.randrange(40) for _ in range(chance.randrange(1, longest))] for _ in range(count)]


def alone(model, prompt, new, eos=None):
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=eos)
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_generate_batch_is_generate(model):
    texts = prompts(7)
    outputs = model.generate_batch(texts, max_new_tokens=9, do_sample=False, eos_token_id=3, max_rows=3)
    assert [o.prompt_ids for o in outputs.values()] == texts
    for text, output in zip(texts, outputs.values(), strict=True):
        assert output.generated_tokens == alone(model, text, 9, eos=3) and output.is_finished() and not output.error
        ids = torch.tensor([text + output.generated_tokens])
        logprobs = model(ids).logits.log_softmax(-1)[0, len(text) - 1 : -1]
        expected = logprobs.gather(1, ids[0, len(text) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), expected, atol=1e-5, rtol=1e-5)


def test_random_arrivals_cancellations_and_parking(model, tmp_path):
    """Rows are taken away, written to files, and go on later; prompts are read in pieces of at most seven tokens."""
    chance, texts = random.Random(1), prompts(12, seed=2)
    batch = ContinuousBatch(model, max_rows=3, prompt_tokens=7)
    waiting = [Request(text, chance.randrange(9)) for text in texts]
    lengths = {request: request.max_new_tokens for request in waiting}
    everything, parked, ended, steps = dict(zip(waiting, texts, strict=True)), [], [], 0
    while waiting or parked or batch.busy:
        steps += 1
        if waiting and chance.random() < 0.5:
            batch.add(waiting.pop())
        if batch.busy and chance.random() < 0.3:
            request = chance.choice([*batch.rows, *batch.waiting])
            batch.pause(request)
            if request.state is not None:
                request.state.save(tmp_path / "parked", model)
                request.state = RecurrentCache.load(tmp_path / "parked", model)
            parked.append(request)
        if parked and chance.random() < 0.4:
            batch.add(parked.pop(chance.randrange(len(parked))))
        if batch.rows and chance.random() < 0.05:
            chance.choice(batch.rows).cancelled = True
        ended += [request for request in batch.step() if request.finish_reason]
    assert sorted(map(id, ended)) == sorted(map(id, everything)) and steps > 20
    for request in ended:
        expected = alone(model, everything[request], lengths[request]) if lengths[request] else []
        cut = len(request.tokens) if request.finish_reason == "cancelled" else None
        assert request.tokens == expected[:cut]
    assert any(request.finish_reason == "length" for request in ended)


def test_a_conversation_goes_on_from_its_state(model):
    """The last token of an answer is not read yet: it comes in front of what follows. One state, two ways on."""
    first, second, third = prompts(3, seed=3)
    batch = ContinuousBatch(model, max_rows=2, prompt_tokens=4)
    request = batch.add(Request(first, 5))
    while batch.busy:
        batch.step()
    assert request.state.seen_tokens == len(first) + 4 and request.unread == request.tokens[-1:]
    ways = [batch.add(Request(request.unread + text, 6, state=request.state)) for text in (second, third)]
    before = copy.deepcopy(request.state.states)
    while batch.busy:
        batch.step()
    for way, text in zip(ways, (second, third), strict=True):
        assert way.tokens == alone(model, first + request.tokens + text, 6)
    for old, new in zip(before, request.state.states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(hidden_size=16, num_hidden_layers=1, vocab_size=6)).eval()


def test_chance_is_each_texts_own(small):
    """By its seed, whatever is beside it; and tokens come as often as their probabilities say."""
    sampling = Sampling(True, temperature=1.5, top_k=5)
    texts = [[n % 6] * (1 + n % 3) for n in range(9)]

    def run(max_rows):
        batch = ContinuousBatch(small, max_rows)
        requests = [batch.add(Request(text, 7, sampling, seed=n, logprobs=2)) for n, text in enumerate(texts)]
        while batch.busy:
            batch.step()
        return requests

    together, apart = run(9), run(1)
    assert [r.tokens for r in together] == [r.tokens for r in apart]
    assert all(len(r.top_logprobs) == 7 and len(row) == 2 for r in together for row in r.top_logprobs)
    batch = ContinuousBatch(small, 500)
    drawn = [batch.add(Request([1, 2], 1, sampling, seed=n)) for n in range(1000)]
    while batch.busy:
        batch.step()
    logits = small(torch.tensor([[1, 2]])).logits[0, -1] / 1.5
    logits[logits.argmin()] = -torch.inf
    expected = logits.double().softmax(-1)
    counts = torch.tensor([r.tokens[0] for r in drawn]).bincount(minlength=6)
    assert counts[logits.argmin()] == 0
    there = expected > 0
    assert stats.chisquare(counts[there], 1000 * expected[there].detach().numpy()).pvalue > 1e-3


def test_an_ended_row_is_not_written_to(small):
    """Rows beside it go on; those behind move up."""
    batch = ContinuousBatch(small, 4, prompt_tokens=3)
    short, long, reading = (batch.add(Request(text, n)) for text, n in (([1], 2), ([2, 3], 8), ([4] * 40, 3)))
    while batch.busy:
        batch.step()
    for request, text in ((short, [1]), (long, [2, 3]), (reading, [4] * 40)):
        assert request.tokens == alone(small, text, request.max_new_tokens)


def test_numbers_that_are_none_end_a_text_alone(small):
    batch, expected = ContinuousBatch(small, 2), alone(small, [1], 4)
    other = next(token for token in range(6) if token not in [1, *expected])
    with torch.no_grad():
        small.model.embed_tokens.weight[other] = torch.nan
    bad, good = batch.add(Request([other], 4)), batch.add(Request([1], 4))
    while batch.busy:
        batch.step()
    assert bad.finish_reason.startswith("error") and not bad.tokens and good.tokens == expected


def test_what_is_refused(small):
    batch = ContinuousBatch(small, 2)
    with pytest.raises(ValueError, match="unread: expected at least one token"):
        Request([], 3)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 0"):
        Request([1], -1)
    with pytest.raises(IndexError, match=r"unread: expected tokens in \[0, 6\), got 6"):
        batch.add(Request([1, 6], 3))
    with pytest.raises(ValueError, match="max_rows: expected at least 1"):
        ContinuousBatch(small, 0)
    with pytest.raises(ValueError, match="model: expected model.eval"):
        ContinuousBatch(copy.deepcopy(small).train())
    other = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(hidden_size=8, num_hidden_layers=1, vocab_size=6)).eval()
    state = other(torch.tensor([[1]]), use_cache=True).cache
    with pytest.raises(ValueError, match="state: expected one row of a hf_rnn_mingru"):
        batch.add(Request([1], 3, state=state))
    with pytest.raises(ValueError, match=r"num_beams: expected none of generate_batch.*got 2"):
        small.generate_batch([[1]], max_new_tokens=3, num_beams=2)
    with pytest.raises(ValueError, match="repetition_penalty"):
        small.generate_batch([[1]], max_new_tokens=3, repetition_penalty=1.2)
    with pytest.raises(TypeError, match=r"unknown arguments \['max_tokens'\]"):
        small.generate_batch([[1]], max_tokens=3)
    assert small.generate_batch([], max_new_tokens=3) == {}


def test_prompts_are_read_in_turn(small):
    """A short prompt does not wait for a long one, nor a long one for those that keep coming."""
    batch = ContinuousBatch(small, 6, prompt_tokens=8)
    texts = {name: [n % 6] * size for n, (name, size) in enumerate([("a", 800), ("b", 640), ("c", 5), ("d", 400)])}
    requests = {name: batch.add(Request(text, 3)) for name, text in texts.items()}
    for _ in range(5):
        batch.step()
    assert requests["c"].tokens and all(len(requests[name].unread) < len(texts[name]) for name in "abd")
    steps, late = 0, []
    while not requests["a"].finish_reason:
        steps += 1
        late += [batch.add(Request([1, 2], 1))] if len(batch.rows) < 6 else []
        batch.step()
    assert steps < 3 * (800 + 640 + 400) / 8
    while batch.busy:
        batch.step()
    for name, request in requests.items():
        assert request.tokens == alone(small, texts[name], 3)
    assert {tuple(r.tokens) for r in late} == {tuple(alone(small, [1, 2], 1))}


def test_nobody_waits_where_nobody_is_decoded(small):
    """Many prompts are read in one step, up to eight times as many tokens as beside texts that go on."""
    batch = ContinuousBatch(small, 12, prompt_tokens=4)
    requests = [batch.add(Request([n % 6] * 4, 2)) for n in range(10)]
    batch.step()
    assert [len(request.tokens) for request in requests] == 8 * [1] + 2 * [0]
    while batch.busy:
        batch.step()
    assert all(request.tokens == alone(small, [n % 6] * 4, 2) for n, request in enumerate(requests))


def test_a_snapshot_is_where_the_text_is(small):
    batch = ContinuousBatch(small, 2)
    request = batch.add(Request([1, 2, 3], 5))
    first = batch.add(Request([2], 1, state=batch.initial_state()))
    batch.step(), batch.step()
    state, unread = batch.snapshot(request), request.unread
    while batch.busy:
        batch.step()
    rest = batch.add(Request(unread, 3, state=state))
    while batch.busy:
        batch.step()
    assert request.tokens[2:] == rest.tokens and first.tokens == alone(small, [2], 1)
