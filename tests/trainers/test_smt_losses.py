"""The terms of the loss against float64 written out, and what may see what."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rnn import DMTConfig, MemoryRNNConfig, MemoryRNNForCausalLM, SMTConfig, SMTTeacher, SMTTeacherConfig
from hf_rnn_trainers.dmt.dmt_trainer import DMTLosses
from hf_rnn_trainers.memory import drift, effective_rank, rollout, teacher_memories
from hf_rnn_trainers.memory.losses import dynamics_loss, prediction_loss, uniformity_loss
from hf_rnn_trainers.memory.windows import Sequences, contexts, futures, sample_positions, sequences
from hf_rnn_trainers.smt.smt_trainer import SMTLosses

VOCABULARY = 11


def make_student(updater="mlp", **settings):
    torch.manual_seed(0)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    sizes = dict(hidden_size=16, num_memory_tokens=3, updater=updater)
    return MemoryRNNForCausalLM(MemoryRNNConfig(**tokens | sizes | settings))


def make_teacher(student, **settings):
    torch.manual_seed(1)
    return SMTTeacher.for_student(student, encoder_layers=1, decoder_layers=1, **settings).eval()


def test_prediction_loss():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(5, 7, VOCABULARY)), random.integers(0, VOCABULARY, (5, 7))
    targets[random.random((5, 7)) < 0.4] = -100
    losses = [
        math.log(sum(math.exp(z) for z in row)) - row[target]
        for row, target in zip(logits.reshape(-1, VOCABULARY), targets.ravel(), strict=True)
        if target != -100
    ]
    actual = prediction_loss(torch.from_numpy(logits), torch.from_numpy(targets))
    assert float(actual) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert prediction_loss(torch.randn(2, 3, 4), torch.full((2, 3), -100)) == 0


def test_dynamics_loss():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 3, 16))
    expected = sum((x - y) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert float(dynamics_loss(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_uniformity_loss(dtype, tolerance):
    tokens = torch.randn(13, 3, 16, dtype=torch.float64).to(dtype)
    unit = [v / np.linalg.norm(v) for v in tokens.double().reshape(-1, 16).numpy()]
    distances = [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for i, a in enumerate(unit) for b in unit[:i]]
    pairs = [math.exp(-2 * distance) for distance in distances]
    expected = math.log(sum(pairs) / len(pairs))
    assert float(uniformity_loss(tokens)) == pytest.approx(expected, abs=tolerance)
    assert float(uniformity_loss(7 * tokens)) == pytest.approx(expected, abs=tolerance)  # of directions, not lengths


def test_uniformity_of_extremes():
    assert float(uniformity_loss(torch.ones(5, 2, 8))) == pytest.approx(0, abs=1e-6)
    assert float(uniformity_loss(torch.tensor([[1.0, 0], [-1.0, 0]]))) == pytest.approx(-8)
    assert float(uniformity_loss(torch.ones(1, 1, 8))) == 0
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(4096, 64, generator=generator)
    assert float(uniformity_loss(many, 512, generator)) == pytest.approx(float(uniformity_loss(many, 4096)), abs=0.02)


def test_windows():
    """Row by row, written out."""
    random = np.random.default_rng(0)
    x, y = torch.arange(20).view(2, 10), torch.arange(100, 120).view(2, 10)
    batch = Sequences(x, y, torch.tensor([10, 6]))
    rows, t = torch.from_numpy(random.integers(0, 2, 30)), torch.from_numpy(random.integers(-1, 10, 30))
    ids, mask = contexts(x, rows, t, 4)
    for row, at, got, there in zip(rows.tolist(), t.tolist(), ids, mask, strict=True):
        assert got[there].tolist() == x[row].tolist()[max(0, at - 3) : at + 1]
    t = t.clamp(min=0)
    future, targets = futures(batch, rows, t, 4)
    for row, at, inputs, outputs in zip(rows.tolist(), t.tolist(), future, targets, strict=True):
        length = int(batch.lengths[row])
        expected = y[row].tolist()[at : min(at + 4, length)]
        assert outputs.tolist() == expected + [-100] * (4 - len(expected))
        seen = x[row].tolist()[at + 1 : at + len(expected)]
        assert inputs.tolist()[: len(seen)] == seen and inputs.shape[0] == 3


@settings(max_examples=20, deadline=None)
@given(left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_is_passed_over(left, right):
    ids = torch.randint(0, 9, (2, 7))
    plain = sequences(ids, ids)
    pad = torch.full((2, left), 10), torch.full((2, right), 10)
    padded, mask = torch.cat([pad[0], ids, pad[1]], 1), torch.ones(2, 7 + left + right)
    mask[:, :left] = mask[:, 7 + left :] = 0
    batch = sequences(padded, padded, mask)
    assert batch.lengths.tolist() == [6, 6]
    assert torch.equal(batch.x[:, :6], plain.x) and torch.equal(batch.y[:, :6], plain.y)
    assert (batch.y[:, 6:] == -100).all()
    with pytest.raises(ValueError, match="attention_mask: expected zeros at padding"):
        sequences(padded, padded, 2 * mask)


def test_positions():
    batch = Sequences(torch.zeros(2, 8), torch.full((2, 8), -100), torch.tensor([8, 5]))
    batch.y[:, 3] = 1
    generator = torch.Generator().manual_seed(0)
    t = sample_positions(batch, 4000, 0.0, 0.0, generator)
    counts = torch.bincount(t[1], minlength=8) / 4000
    assert (counts[:5] - 0.2).abs().max() < 0.03 and counts[5:].sum() == 0
    t = sample_positions(batch, 4000, 0.25, 0.5, generator)
    share = torch.bincount(t[0], minlength=8) / 4000
    assert float(share[0]) == pytest.approx(0.25 + 0.25 / 8, abs=0.03)
    assert float(share[3]) == pytest.approx(0.5 + 0.25 / 8, abs=0.03)


@pytest.mark.parametrize("all_positions", [False, True])
def test_no_target_is_seen_by_what_predicts_it(all_positions):
    """y_{t+j} is x_{t+j+1} here: other tokens from there on change no prediction of it, and no memory before."""
    student = make_student()
    teacher = make_teacher(student, all_positions=all_positions)
    x = torch.randint(0, VOCABULARY, (1, 12))
    batch = Sequences(x, x.roll(-1, 1), torch.tensor([11]))
    rows = torch.zeros(1, dtype=torch.long)
    for t in range(6):
        at = torch.tensor([t])
        memory = teacher.encode(*contexts(x, rows, at, 5))
        future, targets = futures(batch, rows, at, 5)
        logits = teacher.decode(memory, future)
        for j in range(5):
            assert int(targets[0, j]) == int(x[0, t + j + 1])
            other = x.clone()
            other[:, t + j + 1 :] = (other[:, t + j + 1 :] + 1) % VOCABULARY
            changed = Sequences(other, other.roll(-1, 1), batch.lengths)
            memory = teacher.encode(*contexts(other, rows, at, 5))
            again = teacher.decode(memory, futures(changed, rows, at, 5)[0])
            torch.testing.assert_close(again[:, : j + 1], logits[:, : j + 1], rtol=0, atol=1e-6)
            if j < 4:
                assert not torch.allclose(again[:, j + 1 :], logits[:, j + 1 :], atol=1e-4)


def test_memories_of_all_positions_are_those_of_contexts():
    student = make_student()
    teacher = make_teacher(student, all_positions=True)
    x = torch.randint(0, VOCABULARY, (3, 9))
    positions = torch.tensor([0, 4, 8])
    at_once = teacher_memories(student, teacher, x, positions, 9)
    teacher.config.all_positions = True
    rows = torch.arange(3).repeat_interleave(3)
    one_by_one = teacher.encode(*contexts(x, rows, positions.repeat(3), 9)).unflatten(0, (3, 3))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)
    window = teacher_memories(student, teacher, x, positions, 4)
    torch.testing.assert_close(window[:, 0], at_once[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(window[:, 2], at_once[:, 2], atol=1e-2)


def test_a_context_is_padded_exactly():
    student = make_student()
    teacher = make_teacher(student)
    x = torch.randint(0, VOCABULARY, (2, 6))
    alone = teacher.encode(x[:, :3], torch.ones(2, 3, dtype=torch.bool))
    ids, mask = contexts(x, torch.arange(2), torch.tensor([2, 2]), 6)
    torch.testing.assert_close(teacher.encode(ids, mask), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.square().mean(-1), torch.ones(2, 3))


def losses_of(student, teacher, batch, cls=SMTLosses, config=SMTConfig, **settings):
    args = config("unused", use_cpu=True, report_to="none", **settings)
    return cls(student, teacher, args)(*batch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("all_positions", [False, True])
def test_the_whole_loss_written_out(all_positions):
    """With three tokens to take in, every position sampled in turn, from its terms in float64."""
    student = make_student()
    teacher = make_teacher(student, all_positions=all_positions)
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 1, 3)), torch.tensor([3]))
    settings = dict(positions_per_sequence=1, future_size=2, context_size=3)
    coefficients = dict(coef_decoder=2.0, coef_dynamics=3.0, coef_uniformity=0.5, coef_readout=0.7)
    terms = losses_of(student, teacher, batch, **settings, **coefficients)
    generator = torch.Generator().manual_seed(0)
    (t,) = sample_positions(batch, 1, 0.0, 0.0, generator).flatten().tolist()
    memories = [student.initial_memory(1)]
    memories += [teacher.encode(batch.x[:, : i + 1], torch.ones(1, i + 1, dtype=torch.bool)) for i in range(3)]
    steps = range(3) if all_positions else [t]
    errors = [student.update_memory(memories[i], batch.x[:, i]) - memories[i + 1] for i in steps]
    dynamics = np.mean([error.detach().double().square().mean() for error in errors])
    assert float(terms["dynamics"]) == pytest.approx(dynamics, rel=1e-4)
    logits = teacher.decode(memories[t + 1], batch.x[:, t + 1 : t + 2])[0].detach().double()
    wanted = batch.y[0, t : t + 2]
    picked = logits[: len(wanted)].log_softmax(-1).gather(1, wanted[:, None])
    assert float(terms["decoder"]) == pytest.approx(-float(picked.mean()), rel=1e-4)
    assert float(terms["decoder_first"]) == pytest.approx(-float(picked[0]), rel=1e-4)
    read = [student.read_memory(memories[i + 1], batch.x[:, i]).double().log_softmax(-1) for i in steps]
    readout = -np.mean([float(r[0, batch.y[0, i]]) for r, i in zip(read, steps, strict=True)])
    assert float(terms["readout"]) == pytest.approx(readout, rel=1e-4)
    uniformity = float(uniformity_loss(torch.cat([memories[i + 1] for i in steps])))
    assert float(terms["uniformity"]) == pytest.approx(uniformity, abs=1e-4)
    total = 2 * terms["decoder"] + 3 * terms["dynamics"] + 0.5 * terms["uniformity"] + 0.7 * terms["readout"]
    assert float(terms["loss"]) == pytest.approx(float(total), rel=1e-6)


def gradient(loss, parameters):
    grads = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
    return sum(float(g.abs().sum()) for g in grads if g is not None)


@pytest.mark.parametrize("detach", [False, True])
def test_who_learns_from_what(detach):
    student = make_student()
    teacher = make_teacher(student)
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 4, 8)), torch.full((4,), 8))
    terms = losses_of(student, teacher, batch, detach_labels=detach)
    mixer = student.model.layers[0].mixer
    assert (gradient(terms["dynamics"], teacher.parameters()) > 0) != detach
    assert gradient(terms["dynamics"], mixer.updater.parameters()) > 0
    assert gradient(terms["decoder"], student.parameters()) == 0
    assert gradient(terms["decoder"], teacher.parameters()) > 0
    assert gradient(terms["readout"], teacher.parameters()) == 0
    assert gradient(terms["readout"], mixer.updater.parameters()) == 0
    assert gradient(terms["readout"], mixer.out_proj.parameters()) > 0


@pytest.mark.parametrize("updater", ["mlp", "transformer", "gru"])
@pytest.mark.parametrize("all_positions", [False, True])
def test_evaluations_one_after_another_do_not_depend_on_length(updater, all_positions):
    counts = []
    for time in (4, 64):
        student, calls = make_student(updater), []
        teacher = make_teacher(student, all_positions=all_positions)
        student.model.layers[0].mixer.updater.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for layer in [*teacher.encoder.layers, *teacher.decoder.layers]:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, time)), torch.full((2,), time))
        losses_of(student, teacher, batch)["loss"].backward()
        counts.append(len(calls))
    assert counts == [3, 3]  # the update, a layer of the encoder, one of the decoder


@pytest.mark.parametrize("detach", [True, False])
def test_dmt_written_out(detach):
    """Labels at every third step of the student's own rollout; what is detached is."""
    student = make_student()
    teacher = make_teacher(student)
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, 8)), torch.full((2,), 8))
    settings = dict(label_every=3, context_size=4, detach_rollout=detach, coef_dynamics=5.0)
    terms = losses_of(student, teacher, batch, DMTLosses, DMTConfig, **settings)
    first = (3 * torch.rand(2, generator=torch.Generator().manual_seed(0))).long().tolist()
    at = [(row, t) for row in range(2) for t in range(first[row], 8, 3)]
    own, labels = rollout(student, batch.x), []
    for row, t in at:
        context = batch.x[row : row + 1, max(0, t - 3) : t + 1]
        labels.append(teacher.encode(context, torch.ones_like(context, dtype=torch.bool))[0])
    rows, times = torch.tensor(at).unbind(1)
    error = (own[rows, times] - torch.stack(labels)).detach().double().square().mean()
    assert float(terms["dynamics"]) == pytest.approx(float(error), rel=1e-4)
    logits = torch.stack([student.read_memory(own[:, t], batch.x[:, t]) for t in range(8)], 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten())
    assert float(terms["readout"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(5 * float(error) + float(expected), rel=1e-4)
    # the gradient: of single steps from the rollout's memories, or through all of it
    before = torch.cat([student.initial_memory(2)[:, None], own[:, :-1]], 1)
    before = before.detach() if detach else before
    again = student.update_memory(before[rows, times], batch.x[rows, times])
    wanted = 5 * (again - torch.stack(labels).detach()).square().mean()
    weight = student.model.layers[0].mixer.updater.in_proj.weight
    (actual,) = torch.autograd.grad(terms["loss"], weight)
    torch.testing.assert_close(actual, torch.autograd.grad(wanted, weight)[0], rtol=1e-3, atol=1e-6)


def test_drift_and_rank():
    student = make_student()
    teacher = make_teacher(student)
    x, positions = torch.randint(0, VOCABULARY, (3, 8)), torch.tensor([1, 6])
    curve = drift(student, teacher, x, positions, 8)
    for at, value in zip(positions.tolist(), curve.tolist(), strict=True):
        own = student.initial_memory(3)
        for t in range(at + 1):
            own = student.update_memory(own, x[:, t])
        taught = teacher.encode(x[:, : at + 1], torch.ones(3, at + 1, dtype=torch.bool))
        assert value == pytest.approx(float((own - taught).square().mean()), rel=1e-4)
    line = torch.outer(torch.randn(50), torch.randn(12)).view(50, 3, 4)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert 11 < effective_rank(torch.randn(5000, 3, 4)) < 12.01


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hidden_size=30), "hidden_size: expected a multiple of 8"),
        (dict(encoder_layers=0), "encoder_layers: expected at least 1"),
    ],
)
def test_teacher_config(settings, message):
    with pytest.raises(Exception, match=message):
        SMTTeacherConfig(**settings)


def test_dmt_labels_every_step_of_long_rows_in_turn():
    """However short another row of the batch is."""
    student, seen = make_student(), set()
    losses = DMTLosses(
        student, make_teacher(student), DMTConfig("unused", use_cpu=True, report_to="none", label_every=4)
    )
    losses.label = lambda x, rows, t: seen.update(t[rows == 0].tolist()) or student.initial_memory(len(t))
    x, lengths = torch.zeros(2, 12, dtype=torch.long), torch.tensor([12, 1])
    for seed in range(40):
        losses(x, x, lengths, torch.Generator().manual_seed(seed))
    assert seen == set(range(12))


@pytest.mark.parametrize("all_positions", [False, True])
def test_terms_without_targets_are_not_zero(all_positions):
    student = make_student()
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, 8)), torch.tensor([8, 0]))
    batch.y[:] = -100
    terms = losses_of(student, make_teacher(student, all_positions=all_positions), batch)
    assert terms["decoder_first"].isnan() and terms["readout"].isnan() and terms["loss"].isfinite()
    nothing = Sequences(batch.x, batch.y, torch.tensor([0, 0]))
    terms = losses_of(student, make_teacher(student), nothing, DMTLosses, DMTConfig)
    assert terms["dynamics"] == 0 and terms["loss"] == 0
