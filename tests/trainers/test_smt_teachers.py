"""What a teacher can be made of, presets, and an optimizer that goes on from SMT to DMT."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import hf_rnn
from hf_rnn import DMTConfig, DMTTrainer, SMTConfig, SMTTeacher, SMTTrainer
from hf_rnn.tasks import Parity
from hf_rnn_trainers.memory import effective_rank, teacher_memories
from hf_rnn_trainers.memory.teacher import MemoryQueries
from hf_rnn_trainers.memory.windows import contexts

VOCABULARY = 7
COMMON = dict(use_cpu=True, report_to="none", disable_tqdm=True)
OPTIONS = [dict(queries=True), dict(conv_kernel=3), dict(timestamps=9), dict(queries=True, conv_kernel=4, timestamps=9)]


def make_student(**settings):
    torch.manual_seed(0)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    sizes = dict(hidden_size=16, num_memory_tokens=3, updater="mlp")
    return hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**tokens | sizes | settings))


def make_teacher(student, **settings):
    torch.manual_seed(1)
    return SMTTeacher.for_student(student, **dict(encoder_layers=1, decoder_layers=1) | settings).eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("all_positions", [False, True])
def test_memories_see_the_past_and_nothing_else(options, all_positions, tmp_path):
    """Padding on the left changes nothing, nor do later tokens; all at once as one by one; saved as loaded."""
    if options.get("queries") and not all_positions:
        options = {name: value for name, value in options.items() if name != "queries"} | dict(conv_kernel=2)
    student = make_student()
    teacher = make_teacher(student, all_positions=all_positions, hidden_size=16, **options)
    x = torch.randint(0, VOCABULARY, (3, 9))
    rows, t = torch.arange(3), torch.tensor([0, 4, 8])
    padded = teacher.encode(*contexts(x, rows, t, 9))
    for row, at, memory in zip(rows.tolist(), t.tolist(), padded, strict=True):
        ids = x[row : row + 1, : at + 1]
        alone = teacher.encode(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        torch.testing.assert_close(memory, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.square().mean(-1), torch.ones(3), rtol=1e-3, atol=1e-3)
        other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % VOCABULARY], 1)
        assert not torch.allclose(alone, teacher.encode(other, torch.ones_like(ids, dtype=torch.bool))[0], atol=1e-3)
    if all_positions:
        at_once = teacher_memories(student, teacher, x, t, 9)
        torch.testing.assert_close(at_once[rows, rows], padded, rtol=1e-4, atol=1e-5)
        later = x.clone()
        later[:, 5:] = (later[:, 5:] + 1) % VOCABULARY
        torch.testing.assert_close(teacher.encode_all(later)[:, :5], teacher.encode_all(x)[:, :5], rtol=0, atol=1e-6)
    teacher.save_pretrained(tmp_path)
    again = SMTTeacher.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(*contexts(x, rows, t, 9)), padded)


def test_queries_written_out():
    """Head by head in float64."""
    torch.manual_seed(0)
    layer = MemoryQueries(8, 3, 2).double()
    nn.init.normal_(layer.places)
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    y = layer(h).detach().numpy()
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    x = h.numpy()
    for n, t, k in np.ndindex(2, 5, 3):
        q = w["query_proj.weight"] @ x[n, t] + w["places"][k]
        keys, values = np.split(x[n, : t + 1] @ w["key_value_proj.weight"].T, 2, 1)
        found = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = np.exp(keys[:, head] @ q[head] / 2)
            found.append(scores / scores.sum() @ values[:, head])
        np.testing.assert_allclose(y[n, t, k], x[n, t] + w["out_proj.weight"] @ np.concatenate(found), rtol=1e-10)


def test_queries_give_memories_more_dimensions():
    """Without them all K D channels are linear in one hidden vector; rank is of many memories, before the norm."""
    student = make_student(num_memory_tokens=4)
    x, ranks = torch.randint(0, VOCABULARY, (64, 12)), {}
    for queries in (False, True):
        teacher = make_teacher(student, all_positions=True, hidden_size=16, queries=queries)
        hidden = []
        teacher.to_memory.register_forward_pre_hook(lambda _, inputs, hidden=hidden: hidden.append(inputs[0]))
        with torch.no_grad():
            h = teacher.encoder(x).last_hidden_state
            if queries:
                weight = teacher.to_memory.weight.unflatten(0, (4, 16))
                raw = torch.einsum("ntkw,kdw->ntkd", teacher.queries(h), weight).flatten(0, 1).flatten(1)
            else:
                raw = (teacher.to_memory(h) - teacher.to_memory.bias).flatten(0, 1)
        ranks[queries] = int(torch.linalg.matrix_rank(raw.double(), rtol=1e-5))
        assert effective_rank(raw) <= ranks[queries] + 1e-6
    assert ranks[False] <= 16 and ranks[True] > 2 * ranks[False]


def test_a_new_teacher_is_no_smaller_than_its_student():
    for settings in (dict(), dict(hidden_size=64), dict(updater="transformer", updater_layers=4)):
        student = make_student(**settings)
        for layers in (dict(encoder_layers=1, decoder_layers=0), dict(encoder_layers=2, decoder_layers=2)):
            teacher = SMTTeacher.for_student(student, **layers)
            assert teacher.config.hidden_size >= student.config.hidden_size
            networks = [teacher.encoder, teacher.decoder] if layers["decoder_layers"] else [teacher.encoder]
            size = sum(p.numel() for network in networks for p in network.layers.parameters())
            assert student.num_parameters() <= size
    teacher = SMTTeacher.for_student(make_student(), all_positions=True)
    assert teacher.config.queries == (teacher.config.hidden_size < 48)
    assert not SMTTeacher.for_student(make_student(), all_positions=True, hidden_size=48).config.queries


TASK = Parity(length=8)
SHORT = dict(per_device_train_batch_size=8, max_steps=4, logging_steps=1, save_strategy="no")


@pytest.mark.parametrize("name", ["dense", "rare"])
def test_presets_train(name, tmp_path):
    model = make_student(vocab_size=2)
    smt = SMTTrainer(
        model,
        SMTConfig.preset(name, str(tmp_path / "smt"), **SHORT | COMMON | dict(save_strategy="steps", save_steps=4)),
        train_dataset=TASK,
        eval_dataset=Parity(length=8, size=8, seed=1),
    )
    smt.train()
    names = {name for entry in smt.state.log_history for name in entry}
    assert ("student" in names, "decoder" in names) == ((True, False) if name == "dense" else (False, True))
    assert {"eval_drift", "eval_loss"} <= set(smt.evaluate())
    checkpoint = str(tmp_path / "smt" / "checkpoint-4")
    args = DMTConfig.preset(name, str(tmp_path / "dmt"), optimizer_from=checkpoint, **SHORT | COMMON)
    dmt = DMTTrainer(
        model, args, teacher=smt.teacher, train_dataset=TASK, eval_dataset=Parity(length=8, size=8, seed=1)
    )
    dmt.train()
    names = {name for entry in dmt.state.log_history for name in entry}
    assert ("dynamics" in names) == (name == "rare")  # else no labels are made, but to be measured
    assert {"eval_drift", "eval_dynamics"} <= set(dmt.evaluate())


PAPER = dict(hidden_size=256, num_memory_tokens=16, updater="transformer", updater_layers=8, num_heads=8)


def test_the_papers_setting(tmp_path):
    """Networks of its sizes, three steps of SMT and one of DMT on short rows."""
    model = make_student(vocab_size=2, **PAPER)
    settings = COMMON | dict(per_device_train_batch_size=2, save_strategy="no", logging_steps=1)
    smt = SMTConfig.preset("paper", str(tmp_path / "smt"), **settings | dict(max_steps=3, warmup_steps=0))
    trainer = SMTTrainer(model, smt, train_dataset=TASK)
    teacher = trainer.teacher.config
    assert (teacher.hidden_size, teacher.encoder_layers, teacher.decoder_layers, teacher.num_heads) == (256, 8, 4, 8)
    assert (teacher.num_memory_tokens, teacher.memory_size, teacher.all_positions) == (16, 256, False)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 3 and np.isfinite(found).all()
    dmt = DMTConfig.preset("paper", str(tmp_path / "dmt"), **settings | dict(max_steps=1))
    DMTTrainer(model, dmt, teacher=trainer.teacher, train_dataset=TASK).train()


def test_settings_win_over_a_preset():
    args = SMTConfig.preset("dense", "unused", student_steps=2, **COMMON)
    assert args.student_steps == 2 and args.coef_first == 1.0
    paper, default = SMTConfig.preset("paper", "unused", **COMMON), SMTConfig("unused", **COMMON)
    for name in ("learning_rate", "context_size", "future_size", "coef_dynamics", "lr_scheduler_type", "student_steps"):
        assert getattr(paper, name) == getattr(default, name)
    paper = DMTConfig.preset("paper", "unused", **COMMON)
    assert (paper.learning_rate, paper.label_every, paper.lr_scheduler_type) == (3e-5, 16, "cosine")
    with pytest.raises(ValueError, match="preset: expected one of dense, rare, paper, got 'other'"):
        DMTConfig.preset("other", "unused")


def test_the_optimizer_goes_on(tmp_path):
    """DMT's first step from the moments that SMT left the student's parameters, at DMT's rate, by AdamW written out."""
    model = make_student(vocab_size=2)
    settings = SHORT | COMMON | dict(save_strategy="steps", save_steps=4)
    smt = SMTTrainer(model, SMTConfig(str(tmp_path / "smt"), **settings), train_dataset=TASK)
    smt.train()
    moments = {name: {k: v.clone() for k, v in smt.optimizer.state[p].items()} for name, p in model.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if not gradients:
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    settings = SHORT | COMMON | dict(max_steps=1, warmup_steps=0, learning_rate=1e-3, max_grad_norm=1.0)
    args = DMTConfig(str(tmp_path / "dmt"), optimizer_from=str(tmp_path / "smt" / "checkpoint-4"), **settings)
    dmt = DMTTrainer(model, args, teacher=smt.teacher, train_dataset=TASK, callbacks=[Look()])
    dmt.train()
    decayed = {id(p) for p in dmt.optimizer.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        assert name in gradients and float(moments[name]["step"]) == 4
        mean = 0.9 * moments[name]["exp_avg"].double() + 0.1 * gradients[name].double()
        square = 0.95 * moments[name]["exp_avg_sq"].double() + 0.05 * gradients[name].double().square()
        step = mean / (1 - 0.9**5) / ((square / (1 - 0.95**5)).sqrt() + 1e-8)
        expected = start[name].double() * (1 - 1e-3 * (0.01 if id(p) in decayed else 0)) - 1e-3 * step
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: SMTConfig(f, teacher_decoder_layers=0, **COMMON), "coef_decoder: expected 0"),
        (lambda f: SMTConfig(f, teacher_queries=True, **COMMON), "queries: the registers are such"),
        (lambda f: SMTConfig(f, teacher_conv_kernel=-1, **COMMON), "conv_kernel: expected at least 0"),
    ],
)
def test_refusals(make, message, tmp_path):
    with pytest.raises(Exception, match=message):
        SMTTrainer(make_student(), make(str(tmp_path)), train_dataset=TASK)


def test_other_refusals(tmp_path):
    student = make_student(vocab_size=2)
    teacher = make_teacher(student, timestamps=4)
    with pytest.raises(ValueError, match="timestamps: the teacher knows contexts of 4 tokens, got 9"):
        teacher.encode(torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool))
    smt = SMTConfig(str(tmp_path / "smt"), **SHORT | COMMON | dict(save_strategy="steps", save_steps=4))
    SMTTrainer(student, smt, train_dataset=TASK).train()
    settings = SHORT | COMMON
    for folder, network, message in (
        ("smt", student, "optimizer_from: expected a checkpoint folder with optimizer.pt"),
        ("smt/checkpoint-4", make_student(vocab_size=2, hidden_size=24), "is of another network than this student"),
    ):
        args = DMTConfig(str(tmp_path / "dmt"), optimizer_from=str(tmp_path / folder), **settings)
        trainer = DMTTrainer(network, args, teacher=make_teacher(network), train_dataset=TASK)
        with pytest.raises(ValueError, match=message):
            trainer.train()
