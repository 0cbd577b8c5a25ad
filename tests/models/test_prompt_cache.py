"""Prompts that begin alike: each beginning is read once, and the tokens are those of reading all of it."""

import pytest
import torch

from hf_rnn import PromptCache

OPTIONS = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.fixture
def counted(model):
    """How many tokens a model's backbone has read."""
    counts = [0]

    def count(module, args, kwargs):
        counts[0] += (args[0] if args else kwargs["input_ids"]).numel()

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def kept(prompts):
    """The texts whose states are kept; checks the books on the way."""
    found, total, nodes = [], 0, [(prompts.root, [])]
    while nodes:
        node, text = nodes.pop()
        total += node.tokens.nbytes + (0 if node.state is None else node.state.nbytes)
        assert node is prompts.root or node.state is not None or node.children, "a way to nowhere"
        if node.state is not None:
            found.append(tuple(text))
        for first, child in node.children.items():
            assert child.parent is node and first == child.tokens[0]
            nodes.append((child, text + child.tokens.tolist()))
    assert total == prompts.nbytes <= prompts.max_bytes and len(found) == len(prompts._recent)
    return set(found)


def test_hit_or_miss_the_same_tokens(model):
    """Random prompts that begin with pieces of one another, in any order, with a budget that throws states out."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randint(0, 58, (1, 40), generator=generator)
    prompts = PromptCache(model, max_bytes=20 * model(base).cache.nbytes, every=7)
    for _ in range(12):
        same, own = torch.randint(0, 40, (2,), generator=generator).tolist()
        ids = torch.cat([base[:, :same], torch.randint(0, 58, (1, own % 9 + 1), generator=generator)], 1)
        found = model.generate(ids, past_key_values=prompts.read(ids), **OPTIONS)
        assert torch.equal(found, model.generate(ids, **OPTIONS))
        kept(prompts)


@pytest.mark.parametrize("architecture", ["mingru", "lstm"], indirect=True)
def test_a_hundred_prompts_with_one_beginning(model, counted):
    """4,096 tokens are read once, and of each prompt the rest."""
    prompts, prefix = PromptCache(model), torch.randint(0, 58, (1, 4096))
    for _ in range(100):
        ids = torch.cat([prefix, torch.randint(0, 58, (1, 7))], 1)
        assert prompts.read(ids).seen_tokens == 4102
    assert 4096 + 99 * 4 < counted[0] <= 4096 + 100 * 6, "some begin alike behind it as well"
    before = counted[0]
    assert prompts.read(ids).seen_tokens == 4102 and counted[0] == before


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_what_is_kept(model, ids, counted):
    prompts = PromptCache(model, every=5)
    text = ids[:1]
    prompts.read(text)
    a = tuple(text[0].tolist())
    assert kept(prompts) == {a[:5], a[:10], a[:15], a[:16]} and counted[0] == 16
    branch = torch.cat([text[:, :8], text[:, :4]], 1)  # parts after 8 tokens: read from 5 on, kept at 8
    b = tuple(branch[0].tolist())
    prompts.read(branch)
    assert kept(prompts) == {a[:5], a[:10], a[:15], a[:16], b[:8], b[:10], b[:11]} and counted[0] == 16 + 6
    prompts.read(torch.cat([text[:, :8], text[:, 9:10], text[:, :1]], 1))
    assert counted[0] == 16 + 6 + 1
    prompts.read(text[:, :1])
    assert counted[0] == 16 + 6 + 1


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_the_least_recently_used_goes_first(model, ids):
    texts = [ids[row : row + 1, :6] for row in range(3)]
    state = model(ids[:1]).cache
    prompts = PromptCache(model, max_bytes=2 * (state.nbytes + 40) + 20)
    prompts.read(texts[0]), prompts.read(texts[1])
    prompts.read(texts[0]), prompts.read(texts[2])
    assert kept(prompts) == {tuple(texts[n][0, :5].tolist()) for n in (0, 2)}
    prompts.max_bytes = 10
    prompts.read(texts[1])
    assert kept(prompts) == set() and prompts.nbytes == 0


@pytest.mark.parametrize("architecture", ["gru", "minlstm-attention", "xlstm"], indirect=True)
def test_batches(model, ids):
    """Rows of other lengths, padded on the left, one of them a single token."""
    prompts, mask = PromptCache(model, every=4), torch.ones_like(ids)
    mask[0, :16], mask[1, :5] = 0, 0
    ids = ids.masked_fill(mask == 0, 58)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    for _ in range(2):
        state = prompts.read(ids, mask)
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=state, **OPTIONS), expected)
    with pytest.raises(ValueError, match="padded on the left alone"):
        prompts.read(ids, mask.flip(1))


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_an_answer_for_the_next_turn(model, ids, counted):
    prompts = PromptCache(model)
    state = prompts.read(ids[:1])
    answer = model.generate(ids[:1], past_key_values=state, **OPTIONS)
    prompts.put(answer[:, :-1], state)
    turn = torch.cat([answer, ids[1:2]], 1)
    counted[0] = 0
    state = prompts.read(turn)
    assert counted[0] == 17
    assert torch.equal(model.generate(turn, past_key_values=state, **OPTIONS), model.generate(turn, **OPTIONS))
    with pytest.raises(ValueError, match="expected one row, got 3"):
        prompts.put(ids, state)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_other_weights(model, ids):
    prompts = PromptCache(model)
    prompts.read(ids)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    state = prompts.read(ids)
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, past_key_values=state, **OPTIONS), expected)
    with pytest.raises(ValueError, match="max_bytes, every"):
        PromptCache(model, every=0)
