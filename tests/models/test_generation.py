"""generate() in every mode, against a greedy loop without any cache."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer

from hf_rnn import byte_tokenizer


def generate(model, *arguments, **options):
    return model.generate(*arguments, **dict(max_new_tokens=12, do_sample=False, eos_token_id=None) | options)


def greedy_without_cache(model, ids, steps=12):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def assert_same(state, other):
    assert state.seen_tokens == other.seen_tokens
    for layer, others in zip(state.states, other.states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, others, strict=True))


def test_greedy(model, ids):
    assert torch.equal(generate(model, ids), greedy_without_cache(model, ids))
    assert torch.equal(generate(model, ids, use_cache=False), greedy_without_cache(model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_different_lengths(model, ids, side):
    mask = torch.ones_like(ids)
    for row, count in enumerate([5, 0, 11]):
        mask[row, :count] = 0
    padded = ids.masked_fill(mask == 0, 58)
    if side == "right":
        padded, mask = padded.flip(1), mask.flip(1)
    new = generate(model, padded, attention_mask=mask)[:, 17:]
    if side == "left":  # generate() reads the next token at the last position: on the right it must not be padding
        for row in range(3):
            alone = ids[row : row + 1, mask[row].bool()]
            assert torch.equal(new[row], greedy_without_cache(model, alone)[0, alone.shape[1] :])
    else:
        state = model(padded, attention_mask=mask, use_cache=True).past_key_values
        for row in range(3):
            alone = model(padded[row : row + 1, mask[row].bool()], use_cache=True).past_key_values
            torch.testing.assert_close(state[1][0][row], alone[1][0][0], rtol=1e-5, atol=1e-5)


def test_beams(model, ids):
    with_cache = generate(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(with_cache, generate(model, ids, num_beams=3, num_return_sequences=2, use_cache=False))
    assert with_cache.shape == (6, 29)


def test_sampling(model, ids):
    torch.manual_seed(3)
    a = generate(model, ids, do_sample=True, num_return_sequences=4)
    torch.manual_seed(3)
    b = generate(model, ids, do_sample=True, num_return_sequences=4, use_cache=False)
    assert torch.equal(a, b) and a.shape == (12, 29)
    assert not torch.equal(a[0], a[1])


def test_going_on_from_a_returned_cache(model, ids):
    first = generate(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 17 + 5
    second = generate(model, first.sequences, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy_without_cache(model, ids))


def test_a_second_turn(model, ids):
    """A cache, more prompt, and a mask over both."""
    state = model(ids, use_cache=True).past_key_values
    turn = torch.cat([ids, ids[:, :4].flip(1)], 1)
    output = generate(model, turn, attention_mask=torch.ones_like(turn), past_key_values=state)
    assert torch.equal(output, greedy_without_cache(model, turn))


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_a_second_turn_alone(model, ids):
    """New tokens without those of the state, told apart by a mask over both; without it, an error that says so."""
    state, turn = model(ids, use_cache=True).past_key_values, ids[:, :4].flip(1)
    whole = torch.cat([ids, turn], 1)
    for tokens in (turn, ids, turn[:, :0]):
        with pytest.raises(ValueError, match="input_ids: expected"):
            generate(model, tokens, past_key_values=state)
    output = generate(model, turn, attention_mask=torch.ones_like(whole), past_key_values=state)
    assert torch.equal(output[:, 4:], greedy_without_cache(model, whole)[:, 21:])


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_an_empty_prompt_is_refused(model, ids):
    for nothing in (dict(inputs=ids[:, :0]), dict(input_ids=ids[:, :0])):
        with pytest.raises(ValueError, match=r"input_ids: expected at least one token, got shape \(3, 0\)"):
            generate(model, **nothing)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected at least one token, got shape \(3, 0, 16\)"):
        generate(model, inputs_embeds=torch.zeros(3, 0, 16))
    state = model(ids).past_key_values
    expected = copy.deepcopy(state)
    assert model(ids[:, :0], past_key_values=state).logits.shape == (3, 0, 61), "forward reads nothing, and goes on"
    assert_same(state, expected)


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
@pytest.mark.parametrize("wide", [dict(num_return_sequences=3, do_sample=True), dict(num_beams=3)])
def test_a_state_is_not_widened_for_its_owner(model, ids, wide):
    """Beams and samples go on from a copy: the caller's state is as it was."""
    state = model(ids[:, :-2], use_cache=True).past_key_values
    expected = copy.deepcopy(state)
    torch.manual_seed(0)
    first = generate(model, ids, past_key_values=state, **wide)
    assert_same(state, expected)
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, use_cache=False, **wide), first)


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_a_prompt_in_chunks(model, ids):
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), greedy_without_cache(model, ids))


def test_from_embeddings(model, ids):
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, inputs_embeds=embeds), greedy_without_cache(model, ids)[:, 17:])


def test_streaming(make_model):
    model, tokenizer = make_model(vocab_size=259), byte_tokenizer()
    inputs = tokenizer("Hello", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(model, **inputs, streamer=streamer, pad_token_id=256)
    assert "".join(streamer) == tokenizer.decode(output[0, 5:])


def test_one_token_per_step(model, ids):
    """A prompt is read once; each further token is one step of one token."""
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    generate(model, ids)
    hook.remove()
    assert lengths == [17] + [1] * 11


def test_logits_processors_and_scores(model, ids):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)

    output = generate(model, ids, logits_processor=[Only()], output_scores=True, return_dict_in_generate=True)
    assert (output.sequences[:, 17:] == 7).all() and len(output.scores) == 12


def test_static_cache_is_not_needed(model, ids):
    assert torch.equal(generate(model, ids, cache_implementation="static"), greedy_without_cache(model, ids))


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)])
def test_beams_and_samples_from_a_returned_cache(model, ids, options):
    turn = torch.cat([ids, ids[:, :4].flip(1)], 1)
    options = dict(max_new_tokens=6, eos_token_id=None) | options
    state = model(ids, use_cache=True).past_key_values
    torch.manual_seed(0)
    output = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=state, **options)
    torch.manual_seed(0)
    assert torch.equal(output, model.generate(turn, attention_mask=torch.ones_like(turn), **options))
