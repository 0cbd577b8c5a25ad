"""Steps of the student with a gradient: chunks, SMT's and DMT's losses through them, and training without a teacher."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import TrainerCallback

import hf_rnn
from hf_rnn import (
    DMTConfig,
    DMTTrainer,
    RecurrentTrainer,
    RecurrentTrainingArguments,
    SMTConfig,
    SMTTeacher,
    SMTTrainer,
)
from hf_rnn.tasks import Parity
from hf_rnn_trainers.dmt.dmt_trainer import DMTLosses
from hf_rnn_trainers.memory.rollouts import rollout, run_chunks
from hf_rnn_trainers.memory.windows import Sequences, chunks, sample_positions, sequences
from hf_rnn_trainers.smt.smt_trainer import SMTLosses

VOCABULARY = 7
COMMON = dict(use_cpu=True, report_to="none", disable_tqdm=True)


def make_student(**settings):
    torch.manual_seed(0)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    sizes = dict(hidden_size=8, num_memory_tokens=2, updater="mlp")
    return hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**tokens | sizes | settings))


def make_teacher(student, **settings):
    torch.manual_seed(1)
    return SMTTeacher.for_student(student, encoder_layers=1, decoder_layers=1, **settings).eval()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), size=st.integers(1, 14), seed=st.integers(0, 99))
def test_chunks_hold_every_token_once(lengths, size, seed):
    rows, start, end = chunks(torch.tensor(lengths), size, torch.Generator().manual_seed(seed))
    held = [(row, t) for row, a, b in zip(*(x.tolist() for x in (rows, start, end)), strict=True) for t in range(a, b)]
    assert held == [(row, t) for row, length in enumerate(lengths) for t in range(length)]
    assert ((end - start) <= size).all() and (end > start).all()
    inner = (start > 0) & (end < torch.tensor(lengths)[rows])
    assert (end - start)[inner].eq(size).all()


def test_every_position_begins_a_chunk_as_often():
    generator = torch.Generator().manual_seed(0)
    _, start, _ = chunks(torch.full((8000,), 9), 4, generator)
    share = torch.bincount(start, minlength=9) / 8000
    assert share[0] == 1 and (share[1:] - 0.25).abs().max() < 0.02


def test_students_that_update_one_token_at_a_time():
    model, x = make_student(), torch.randint(0, VOCABULARY, (3, 6))
    alone = SimpleNamespace(initial_memory=model.initial_memory, update_memory=model.update_memory)
    torch.testing.assert_close(rollout(alone, x), rollout(model, x))
    places = [torch.tensor(part) for part in ([0, 0, 2], [0, 2, 4], [2, 6, 5])]
    found = [run_chunks(student, x, model.initial_memory(3), *places) for student in (alone, model)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][1].tolist() == [0, 0, 1, 1, 1, 1, 2] and found[0][2].tolist() == [0, 1, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_truncated_gradients_written_out(k):
    """In float64: from the detached rollout, k steps, the readout's loss after each; the last row has two tokens."""
    student, lengths = make_student().double(), torch.tensor([8, 8, 2])
    x, y = torch.randint(0, VOCABULARY, (2, 3, 8))
    y[0, ::2] = -100
    args = DMTConfig("unused", readout_steps=k, coef_readout=0.5, **COMMON)
    # the start of a rollout is drawn before the chunks
    generator = torch.Generator().manual_seed(0)
    torch.rand(3, generator=generator)
    parts = list(zip(*(part.tolist() for part in chunks(lengths, k, generator)), strict=True))
    total, count = 0.0, 0
    for row, start, end in parts:
        memory = student.initial_memory(1)
        for t in range(end):
            memory = memory.detach() if t == start else memory
            memory = student.update_memory(memory, x[row : row + 1, t])
            if t >= start and y[row, t] != -100:
                total = total + F.cross_entropy(student.read_memory(memory, x[row : row + 1, t])[0], y[row, t])
                count += 1
    expected = torch.autograd.grad(0.5 * total / count, [*student.parameters()], allow_unused=True)
    terms = DMTLosses(student, None, args)(x, y, lengths, torch.Generator().manual_seed(0))
    assert terms["readout"].item() == pytest.approx((total / count).item(), rel=1e-12)
    assert "dynamics" not in terms
    found = torch.autograd.grad(terms["loss"], [*student.parameters()], allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_a_teacher_it_is_truncated_backpropagation(tmp_path):
    """`backprop="truncated"` of RecurrentTrainer, where chunks begin where its pieces do."""
    k, ids = 3, torch.randint(0, VOCABULARY, (2, 10))
    model = make_student()
    args = RecurrentTrainingArguments(str(tmp_path), backprop="truncated", chunk_size=k, **COMMON)
    trainer = RecurrentTrainer(model, args)
    trainer.training_step(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=torch.tensor(18))
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def regular(seed):  # first chunks of k tokens
        generator = torch.Generator().manual_seed(seed)
        torch.rand(2, generator=generator)
        _, start, end = chunks(torch.tensor([9, 9]), k, generator)
        return (end[start == 0] == k).all()

    seed = next(filter(regular, range(1000)))
    losses = DMTLosses(model, None, DMTConfig(str(tmp_path), readout_steps=k, **COMMON))
    losses(*sequences(ids, ids), torch.Generator().manual_seed(seed))["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_dmt_with_both(k):
    """With a teacher the readout's steps are added to what there was."""
    student = make_student()
    teacher = make_teacher(student)
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, 8)), torch.full((2,), 8))
    found = []
    for steps, who in ((0, teacher), (k, teacher), (k, None)):
        args = DMTConfig("unused", label_every=2, readout_steps=steps, **COMMON)
        found.append(DMTLosses(student, who, args)(*batch, torch.Generator().manual_seed(0)))
    paper, both, _ = found
    assert paper["dynamics"] == both["dynamics"]
    assert float(paper["readout"]) == pytest.approx(float(both["readout"]), rel=1e-6)  # the same memories are read
    weight = student.model.layers[0].mixer.updater.in_proj.weight
    gradients = [torch.autograd.grad(terms["loss"], weight)[0] for terms in found]
    torch.testing.assert_close(gradients[1], gradients[0] + gradients[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_smt_written_out(k, all_positions):
    """Each chunk from the teacher's memory before it: errors, readouts and what reaches the encoder."""
    student = make_student()
    teacher = make_teacher(student, all_positions=all_positions)
    batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, 8)), torch.tensor([8, 5]))
    coefficients = dict(coef_student=0.7, coef_first=0.3, coef_readout=2.0)
    args = SMTConfig("unused", student_steps=k, positions_per_sequence=2, **coefficients, **COMMON)
    losses = SMTLosses(student, teacher, args)
    generator = torch.Generator().manual_seed(0)
    t = sample_positions(batch, 2, 0.0, 0.0, generator)
    if all_positions:
        seen = list(zip(*(part.tolist() for part in chunks(batch.lengths, k, generator)), strict=True))
    else:
        ends = batch.lengths.tolist()
        seen = [(row, at, min(at + k, ends[row])) for row in range(2) for at in t[row].tolist()]

    def taught(row, at):
        ids = batch.x[row : row + 1, : at + 1]
        return teacher.encode(ids, torch.ones_like(ids, dtype=torch.bool)) if at >= 0 else student.initial_memory(1)

    errors, readouts, own = [], [], []
    for row, start, end in seen:
        memory = taught(row, start - 1)
        for at in range(start, end):
            token, target = batch.x[row : row + 1, at], batch.y[row : row + 1, at]
            memory = student.update_memory(memory, token)
            errors.append((memory - taught(row, at)).square().mean())
            own.append(F.cross_entropy(student.read_memory(memory, token), target))
            readouts.append(F.cross_entropy(student.read_memory(taught(row, at), token), target))
    terms = losses(*batch, torch.Generator().manual_seed(0))
    for name, values in dict(dynamics=errors, student=own, readout=readouts).items():
        assert float(terms[name]) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)
    parameters = [*teacher.encoder.parameters(), *student.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)

    for name, values in dict(dynamics=errors, student=own).items():
        for a, b in zip(gradients(terms[name]), gradients(torch.stack(values).mean()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    # of the readout the encoder sees a share
    expected, count = gradients(torch.stack(readouts).mean()), len([*teacher.encoder.parameters()])
    for i, (a, b) in enumerate(zip(gradients(terms["readout"]), expected, strict=True)):
        if b is not None and a is not None:
            torch.testing.assert_close(a, b * (0.3 if i < count else 1), rtol=1e-3, atol=1e-6)
    total = terms["decoder"] + 0.1 * terms["dynamics"] + 0.001 * terms["uniformity"] + 2 * terms["readout"]
    assert float(terms["loss"]) == pytest.approx(float(total + 0.7 * terms["student"]), rel=1e-6)


def test_as_many_evaluations_as_steps():
    """Whatever the length of rows."""
    for time in (8, 64):
        student, calls = make_student(), []
        teacher = make_teacher(student, all_positions=True)
        student.model.layers[0].mixer.updater.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = Sequences(*torch.randint(0, VOCABULARY, (2, 2, time)), torch.full((2,), time))
        args = SMTConfig("unused", student_steps=4, coef_student=1.0, **COMMON)
        SMTLosses(student, teacher, args)(*batch, torch.Generator().manual_seed(0))
        assert len(calls) == 4


TASK = Parity(length=8)
SHORT = dict(per_device_train_batch_size=8, max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=3)


def make_trainer(kind, folder, callbacks=None):
    model, settings = make_student(vocab_size=2), SHORT | COMMON
    data = dict(train_dataset=TASK, eval_dataset=Parity(length=8, size=8, seed=1), callbacks=callbacks)
    if kind == "no teacher":
        return DMTTrainer(model, DMTConfig(str(folder), readout_steps=3, **settings), teacher=False, **data)
    args = SMTConfig(str(folder), student_steps=3, coef_student=1.0, coef_first=1.0, all_positions=True, **settings)
    return SMTTrainer(model, args, teacher=make_teacher(model, all_positions=True), **data)


@pytest.mark.parametrize("kind", ["no teacher", "steps"])
def test_resume_is_exact(kind, tmp_path):
    """6 steps = 3, save, resume, 3 more, bit for bit."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4  # step 3 is made again

    straight = make_trainer(kind, tmp_path / "straight")
    straight.train()
    make_trainer(kind, tmp_path / "parts", [Stop()]).train()
    resumed = make_trainer(kind, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for a, b in zip(straight.losses.parameters(), resumed.losses.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "parts" / "checkpoint-3" / "teacher").exists() == (kind != "no teacher")
    metrics = resumed.evaluate()
    assert ("eval_drift" in metrics) == (kind != "no teacher") and metrics["eval_readout"] > 0


def test_parity_is_learned_without_a_teacher(tmp_path):
    """The longest gradient is of two steps, the row of eight; the loss is near ln 2 as long as nothing is learned."""
    args = DMTConfig(
        str(tmp_path), readout_steps=2, max_steps=80, learning_rate=2e-2, per_device_train_batch_size=16, **COMMON
    )
    trainer = DMTTrainer(
        make_student(vocab_size=2, hidden_size=16),
        args,
        teacher=False,
        train_dataset=TASK,
        eval_dataset=Parity(8, 64, 1),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: DMTConfig(f, readout_steps=-1, **COMMON), "readout_steps: expected at least 0"),
        (lambda f: SMTConfig(f, student_steps=0, **COMMON), "student_steps: expected at least 1"),
        (
            lambda f: DMTTrainer(make_student(), DMTConfig(f, **COMMON), teacher=False),
            "readout_steps: expected at least 1",
        ),
        (lambda f: SMTTrainer(make_student(), SMTConfig(f, **COMMON), teacher=False), "teacher: memories are what"),
        (lambda f: SMTTrainer(make_student(), SMTConfig(f, **COMMON), teacher=True), "teacher: expected an SMTTeacher"),
    ],
)
def test_refusals(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path))
