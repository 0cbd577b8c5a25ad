"""States saved, loaded, copied, selected and stacked: every way on gives what an uninterrupted run gives."""

import copy
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hf_rnn
from hf_rnn import RecurrentCache
from hf_rnn.skeleton import state_file
from hf_rnn.skeleton.state_file import fingerprint


@torch.no_grad()
def read(model, ids, state=None):
    return model(ids, past_key_values=state, use_cache=True).cache


@torch.no_grad()
def logits(model, ids, state):
    return model(ids, past_key_values=state).logits


def tensors(state):
    return [x for layer in state.states for x in layer]


def test_saved_and_loaded(model, ids, tmp_path):
    """In every layout, windows of attention included: the same numbers, and the same text from there on."""
    state = read(model, ids)
    state.beside["logits"] = torch.arange(6.0).view(3, 2)
    state.save(tmp_path / "a.state")
    other = RecurrentCache.load(tmp_path / "a.state", model)
    assert other.seen_tokens == 17 and other.model_type == model.config.model_type and not other.ends_inside_patch
    assert torch.equal(other.beside["logits"], state.beside["logits"])
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(other), strict=True))
    assert torch.equal(logits(model, ids[:, :5], other), logits(model, ids[:, :5], state))
    assert other.beside == {}, "what lies beside is of the token before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_the_whole_model_is_not_needed(model, ids, tmp_path):
    """A state belongs to the backbone: other heads have it as well, and the file is small."""
    read(model, ids).save(tmp_path / "a.state")
    classifier = hf_rnn.LSTMForSequenceClassification(model.config)
    classifier.model.load_state_dict(model.model.state_dict())
    assert RecurrentCache.load(tmp_path / "a.state", classifier.eval()).batch_size == 3
    state = RecurrentCache.load(tmp_path / "a.state")
    assert os.path.getsize(tmp_path / "a.state") < state.nbytes + 2000
    assert os.stat(tmp_path / "a.state").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_whose_state_it_is(make_model, model, ids, tmp_path):
    file = tmp_path / "a.state"
    read(model, ids).save(file)
    other = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(ValueError, match="a.state: the state of another model, a hf_rnn_lstm; .* of a hf_rnn_gru"):
        RecurrentCache.load(file, other)
    with pytest.raises(ValueError, match="the state of another hf_rnn_lstm, with other settings or weights"):
        RecurrentCache.load(file, make_model(norm_eps=1e-5))
    with torch.no_grad():
        model.model.layers[1].mixer.in_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="with other settings or weights"):
        RecurrentCache.load(file, model)
    with pytest.raises(ValueError, match="cache: expected the state of a batch of 2, as the input is, got one of 3"):
        model(ids[:2], past_key_values=RecurrentCache.load(file))
    with pytest.raises(ValueError, match="cache: expected the state of a hf_rnn_gru, got hf_rnn_lstm's"):
        other(ids, past_key_values=RecurrentCache.load(file))


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_fingerprints(make_model, ids):
    """The same for what is the same, however it came there; another for every other setting and weight."""
    model, again = make_model(), make_model()
    first = fingerprint(model)
    assert first == fingerprint(model.model) == fingerprint(again) == fingerprint(copy.deepcopy(model))
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[3] += 1
        changed = fingerprint(model)
        assert changed != first
        weight[3] -= 1
        assert fingerprint(model) == first
        model.model.norm.weight.data = weight.data + 1  # seen by its address alone
        assert fingerprint(model) == fingerprint(model) != first
    model.model.norm.weight = torch.nn.Parameter(again.model.norm.weight.detach().clone())
    assert fingerprint(model) == first
    assert fingerprint(make_model(forget_bias=2.0)) != first and fingerprint(make_model().bfloat16()) != first


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_damaged_files(model, ids, tmp_path):
    file, state = tmp_path / "a.state", read(model, ids)
    state.save(file)
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.state: no state, or one that is cut off"):
            RecurrentCache.load(file, model)
    generator = torch.Generator().manual_seed(0)
    for at in [*torch.randint(8, len(whole), (40,), generator=generator).tolist(), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.state: (the state is damaged|no state|expected a state)"):
            RecurrentCache.load(file, model)
    file.write_bytes(whole)
    with safe_open(file, framework="pt") as opened:
        names, metadata = opened.keys(), opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in names}
    for change in (  # what no program of ours writes, with a sum that is right
        dict(layers="100000000"), dict(layers="x"), dict(seen_tokens="-1"), dict(model_type=None), "0.0", "1.0",
    ):  # fmt: skip
        about = metadata | (change if isinstance(change, dict) else {})
        about = {name: value for name, value in about.items() if value is not None and name != "sha256"}
        some = {name: x for name, x in tensors.items() if name != change}
        save_file(some, file, about | {"sha256": state_file._digest(some, about)})
        with pytest.raises(ValueError, match=r"a.state: no state: expected each layer's tensors and \['ends_inside"):
            RecurrentCache.load(file, model)
    save_file({"0.0": torch.zeros(3, 4)}, file)
    with pytest.raises(ValueError, match="expected a state, 'hf_rnn state 1', got format None"):
        RecurrentCache.load(file)
    with pytest.raises(FileNotFoundError):
        RecurrentCache.load(tmp_path / "b.state")


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_written_whole_or_not_at_all(model, ids, tmp_path, monkeypatch):
    """What was there stays where writing fails, and nothing is left lying about."""
    state, file = read(model, ids), tmp_path / "a.state"
    state.save(file)
    before = file.read_bytes()
    read(model, ids, state)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *arguments: full(0))
            with pytest.raises(OSError, match="No space left"):
                state.save(file)
        assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.state"]
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "nowhere" / "a.state")


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_what_is_no_file(model, ids, tmp_path):
    """A device or a folder is not replaced; a link stays one."""
    state = read(model, ids)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        for act in (state.save, RecurrentCache.load):
            with pytest.raises(ValueError, match="expected a state's file, got a folder or a device"):
                act(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a.state")
    state.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and RecurrentCache.load(tmp_path / "folder" / "a.state").seen_tokens == 17


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_killed_while_writing(model, ids, tmp_path):
    state, file = read(model, ids), tmp_path / "a.state"
    state.save(file)
    later = read(model, ids, state)
    child = os.fork()
    if not child:
        os.replace = lambda *_: os._exit(9)  # dies with all written
        later.save(file)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert RecurrentCache.load(file, model).seen_tokens == 17


@pytest.mark.parametrize("architecture", ["mingru"], indirect=True)
def test_what_cannot_be_saved(model, ids, tmp_path):
    with pytest.raises(ValueError, match="state: nothing is read yet"):
        RecurrentCache(2).save(tmp_path / "a.state", model)
    unknown = pickle.loads(pickle.dumps(read(model, ids)))
    with pytest.raises(ValueError, match="model: not known, pass the one that reads it"):
        unknown.save(tmp_path / "a.state")
    unknown.save(tmp_path / "a.state", model)
    RecurrentCache.load(tmp_path / "a.state", model).save(tmp_path / "a.state")


def test_conversations_that_were_apart(model, ids):
    """Rows of several states, read together, give what each gives alone; and are taken apart again."""
    apart = [read(model, ids[row : row + 1, : 9 + 4 * row]) for row in range(3)]
    together = RecurrentCache.stack(apart)
    assert together.batch_size == 3 and together.seen_tokens == 17
    again = RecurrentCache.stack([together.select([2, 0]), together.select(torch.tensor([1]))])
    turn = ids[:, :4].flip(1)
    expected = torch.cat([logits(model, turn[row : row + 1], state) for row, state in enumerate(apart)])
    torch.testing.assert_close(logits(model, turn, together), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, turn[[2, 0, 1]], again), expected[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    for a, b in zip(tensors(again), tensors(RecurrentCache.stack(apart).select([2, 0, 1])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_generation_goes_on_from_a_stack(model, ids):
    """As from a batch padded on the left: to generate(), the shorter texts begin with padding."""
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    apart = [read(model, ids[row : row + 1, : 8 + 4 * row]) for row in range(3)]
    text, mask = torch.full((3, 17), 58), torch.zeros(3, 17, dtype=torch.long)
    for row in range(3):
        length = 9 + 4 * row
        text[row, 17 - length :], mask[row, 17 - length :] = ids[row, :length], 1
    new = model.generate(text, attention_mask=mask, past_key_values=RecurrentCache.stack(apart), **options)[:, 17:]
    for row in range(3):
        alone = model.generate(ids[row : row + 1, : 9 + 4 * row], **options)
        assert torch.equal(new[row], alone[0, 9 + 4 * row :])


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_what_does_not_stack(model, ids):
    state = read(model, ids)
    other = read(hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2)), ids)
    for caches, message in (
        ([], "at least one state"),
        ([state, RecurrentCache(2)], "number 1 is before its first token"),
        ([state, other], "states of one model"),
        ([state, state.to(dtype=torch.bfloat16)], "states of one model"),
    ):
        with pytest.raises(ValueError, match=f"caches: .*{message}"):
            RecurrentCache.stack(caches)
    for rows in ([3], [-1], torch.tensor([0, 5])):
        with pytest.raises(IndexError, match=r"rows: expected numbers in \[0, 3\)"):
            state.select(rows)
    with pytest.raises(ValueError, match="state: nothing is read yet"):
        RecurrentCache(2).select([0])


def test_clones_and_dtypes(model, ids):
    state = read(model, ids)
    state.beside["tokens"] = ids[:, -1:]
    same, half = state.clone(), state.to(dtype=torch.bfloat16)
    expected = logits(model, ids[:, :4], state)
    assert torch.equal(logits(model, ids[:, :4], same), expected) and same.seen_tokens == 21
    assert half.nbytes * 2 == state.nbytes and half.seen_tokens == 17
    assert half.beside["tokens"].dtype == torch.int64
    for t in range(4):
        last = logits(model, ids[:, t : t + 1], half)
    assert all(x.dtype == torch.bfloat16 for x in tensors(half))
    assert (last[:, 0] - expected[:, 3]).norm() < 0.1 * expected[:, 3].norm()


def test_the_text_is_not_needed(model, ids):
    """With seen_tokens = 0 new tokens alone go on from the state, without a mask as long as the past."""
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    state = read(model, ids)
    state.seen_tokens = 0
    turn = ids[:, :4].flip(1)
    new = model.generate(turn, past_key_values=state, **options)[:, 4:]
    assert torch.equal(new, model.generate(torch.cat([ids, turn], 1), **options)[:, 21:])
