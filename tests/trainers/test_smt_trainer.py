"""SMTTrainer and DMTTrainer as Trainers: they learn, resume, keep the teacher apart, and say what they cannot do."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_rnn
from hf_rnn import DMTConfig, DMTTrainer, NonFiniteLossError, SMTConfig, SMTTeacher, SMTTrainer
from hf_rnn.tasks import Retrieval, compute_metrics, preprocess_logits_for_metrics
from hf_rnn_trainers.memory.memory_trainer import load_teacher

TASK = Retrieval(length=8, symbols=4)
TOKENS = dict(vocab_size=5, pad_token_id=None, bos_token_id=None, eos_token_id=None)
DEFAULTS = dict(
    per_device_train_batch_size=8,
    max_steps=6,
    learning_rate=2e-3,
    logging_steps=2,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    label_every=2,
    teacher_encoder_layers=1,
    teacher_decoder_layers=1,
)


def make_model(**settings):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_memory_tokens=2, updater="mlp")
    return hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**TOKENS | sizes | settings))


def make_trainer(folder, cls=SMTTrainer, model=None, data=TASK, callbacks=None, teacher=None, **settings):
    args = (SMTConfig if cls is SMTTrainer else DMTConfig)(**DEFAULTS | dict(output_dir=str(folder)) | settings)
    model = model or make_model()
    torch.manual_seed(1)
    if cls is DMTTrainer and teacher is None:
        teacher = SMTTeacher.for_student(model, encoder_layers=1, decoder_layers=1)
    data = dict(train_dataset=data, eval_dataset=dataclasses.replace(TASK, size=10, seed=9))
    return cls(model, args, teacher=teacher, callbacks=callbacks, **data)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("cls", [SMTTrainer, DMTTrainer])
def test_resume_is_exact(cls, all_positions, tmp_path):
    """6 steps = 3, save, resume, 3 more, bit for bit, for both networks; two batches a step."""
    settings = dict(save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    if cls is SMTTrainer:
        settings |= dict(all_positions=all_positions, positions_per_sequence=2, labelled_share=0.3)
    straight = make_trainer(tmp_path / "straight", cls, **settings)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4  # step 3 is made again

    make_trainer(tmp_path / "parts", cls, callbacks=[Stop()], **settings).train()
    resumed = make_trainer(tmp_path / "parts", cls, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert same(straight.model, resumed.model) and same(straight.teacher, resumed.teacher)
    assert not same(straight.model, make_model())


def test_resume_needs_the_teacher(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / "teacher" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3: teacher/model.safetensors is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 has no teacher"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_checkpoint_is_the_network_alone(tmp_path):
    """It loads and generates in a process that knows nothing of the teacher; the teacher loads, too."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    ids = torch.randint(0, 5, (2, 6))
    expected = trainer.model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    code = f"""
import torch, hf_rnn
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens=8, do_sample=False).tolist())
assert not any("teacher" in name for name, _ in model.named_parameters())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == str(expected.tolist()), result.stderr
    assert same(load_teacher(tmp_path / "elsewhere"), trainer.teacher)


@pytest.mark.slow
def test_smt_then_dmt_learns_to_retrieve(tmp_path):
    """The one late label, by rollouts from the empty memory; DMT takes the teacher from the student's folder."""
    metrics = dict(compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics)
    settings = dict(per_device_train_batch_size=32, learning_rate=3e-3, max_steps=400, lr_scheduler_type="cosine")
    smt = make_trainer(tmp_path, model=make_model(hidden_size=32), all_positions=True, labelled_share=0.5, **settings)
    smt.train()
    smt.save_model()
    before = smt.evaluate()
    args = DMTConfig(**DEFAULTS | settings | dict(output_dir=str(tmp_path / "dmt"), max_steps=100, label_every=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    unseen = dataclasses.replace(TASK, size=256, seed=9)
    dmt = DMTTrainer(model, args, teacher=tmp_path, train_dataset=TASK, eval_dataset=unseen, **metrics)
    teacher = {name: p.clone() for name, p in dmt.teacher.named_parameters()}
    dmt.train()
    assert all(torch.equal(p, teacher[name]) for name, p in dmt.teacher.named_parameters())  # frozen
    after = dmt.evaluate()
    assert after["eval_accuracy"] > 0.5  # chance is 0.25; more takes more steps: benchmarks/memory_retrieval.py
    assert after["eval_drift"] < before["eval_drift"]


def test_eval_loss_is_the_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, labelled_share=0.5)
    metrics = trainer.evaluate()
    rows = [trainer.eval_dataset[i] for i in range(10)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    model = trainer.model.eval()
    memory = model.initial_memory(10)
    for token in ids[:, :-1].unbind(1):
        memory = model.update_memory(memory, token)
    expected = torch.nn.functional.cross_entropy(model.read_memory(memory, ids[:, -2]), labels[:, -1])
    assert metrics["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    names = ["decoder", "decoder_first", "dynamics", "uniformity", "readout", "drift", "drift_last"]
    assert {f"eval_{name}" for name in names} <= set(metrics)


def test_terms_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, labelled_share=1.0)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all({"decoder", "decoder_first", "dynamics", "uniformity"} <= set(e) for e in logged)
    args = trainer.args
    parts = logged[0]["decoder"] + args.coef_dynamics * logged[0]["dynamics"]
    parts += args.coef_uniformity * logged[0]["uniformity"] + logged[0]["readout"]
    assert logged[0]["loss"] == pytest.approx(parts, rel=1e-3)


def test_gradients_are_clipped_separately(tmp_path):
    norms = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for network in (trainer.model, trainer.teacher):
                grads = [p.grad for p in network.parameters() if p.grad is not None]
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer = make_trainer(tmp_path, callbacks=[Look()], max_grad_norm=1e-3, max_steps=2)
    trainer.train()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)


def test_accumulated_batches_are_averaged(tmp_path):
    """The same batch twice is the batch once."""
    settings = dict(per_device_train_batch_size=4, max_steps=2, optim="sgd", learning_rate=0.1)
    once = make_trainer(tmp_path / "once", data=[TASK[0]] * 64, **settings)
    twice = make_trainer(tmp_path / "twice", data=[TASK[0]] * 64, gradient_accumulation_steps=2, **settings)
    for trainer in (once, twice):
        trainer._generator = lambda: torch.Generator().manual_seed(0)
        trainer.train()
    assert not same(once.model, make_model())
    for p, q in zip(once.losses.parameters(), twice.losses.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [SMTTrainer, DMTTrainer])
@pytest.mark.parametrize(
    "make",
    [
        lambda: hf_rnn.LSTMForCausalLM(hf_rnn.LSTMConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, conv_kernel=0)),
        lambda: hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**TOKENS, hidden_size=16, num_hidden_layers=1, conv_kernel=0)),
        lambda: hf_rnn.XLSTMForCausalLM(
            hf_rnn.XLSTMConfig(**TOKENS, hidden_size=16, num_hidden_layers=1, block_layout="neurips", slstm_at="all")
        ),
        lambda: make_model(updater="transformer"),
        lambda: make_model(updater="gru", num_hidden_layers=2),
    ],
    ids=["lstm", "gru", "slstm", "transformer", "two memories"],
)
def test_every_student(cls, make, tmp_path):
    torch.manual_seed(0)
    model = make()
    start = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, cls, model, **({"first_share": 0.5} if cls is SMTTrainer else {}))
    trainer.train()
    # the drift is that of real rollouts, and every parameter has learned
    assert trainer.evaluate()["eval_drift"] > 0
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


def test_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, labelled_share=1.0)
    seen = []
    trainer.losses.register_forward_hook(lambda module, inputs, terms: seen.extend(terms.values()))
    trainer.train()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in seen)
    exact = make_trainer(tmp_path, labelled_share=1.0)
    exact.train()
    a, b = ([e["dynamics"] for e in t.state.log_history if "dynamics" in e] for t in (trainer, exact))
    assert a == pytest.approx(b, rel=0.1)


def test_padded_rows(tmp_path):
    """Text of unequal lengths, padded on either side, with a mask; the padding token never teaches."""
    rows = [torch.randint(0, 4, (n,)).tolist() for n in (3, 9, 5, 7)]
    width = 9
    data = {"input_ids": [], "labels": [], "attention_mask": []}
    for i, row in enumerate(rows * 4):
        pad = width - len(row)
        left = pad if i % 2 else 0
        data["input_ids"].append([4] * left + row + [4] * (pad - left))
        data["labels"].append([-100] * left + row + [-100] * (pad - left))
        data["attention_mask"].append([0] * left + [1] * len(row) + [0] * (pad - left))
    data = Dataset.from_dict(data).with_format("torch")
    for cls in (SMTTrainer, DMTTrainer):
        trainer = make_trainer(tmp_path, cls, data=data)
        trainer.train()
        assert torch.isfinite(torch.stack([p.isfinite().all() for p in trainer.model.parameters()])).all()
        weight = trainer.teacher.encoder.embed_tokens.weight
        trainer.losses.zero_grad()
        if cls is SMTTrainer:
            batch = data[:8]
            trainer.losses.train()
            trainer.compute_loss(trainer.losses, batch).backward()
            assert weight.grad[:4].abs().sum() > 0 and weight.grad[4].abs().sum() == 0


def test_non_finite_loss_stops(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError):
        make_trainer(tmp_path, model=model).train()


MINGRU = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(**TOKENS))
OTHERS = SMTTeacher.for_student(make_model(num_memory_tokens=3))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda f: make_trainer(f, model=MINGRU), ValueError, "nothing to gain"),
        (lambda f: make_trainer(f, model=torch.nn.Linear(2, 2)), TypeError, "model: expected a causal language model"),
        (lambda f: make_trainer(f, coef_dynamics=-1.0), ValueError, "coef_dynamics: expected"),
        (lambda f: make_trainer(f, context_size=0), ValueError, "context_size: expected at least 1"),
        (lambda f: make_trainer(f, first_share=0.7, labelled_share=0.7), ValueError, "first_share, labelled_share"),
        (lambda f: make_trainer(f, teacher=OTHERS), ValueError, "teacher: expected"),
        (lambda f: SMTTrainer(make_model(), DMTConfig(str(f), use_cpu=True)), TypeError, "args: expected a SMTConfig"),
        (lambda f: DMTTrainer(make_model(), DMTConfig(str(f), use_cpu=True)), ValueError, "teacher: expected the one"),
        (lambda f: make_trainer(f, label_smoothing_factor=0.1), ValueError, "label_smoothing_factor"),
        (lambda f: make_trainer(f, gradient_checkpointing=True), ValueError, "gradient_checkpointing"),
        (lambda f: SMTTrainer(None, SMTConfig(str(f), use_cpu=True), model_init=make_model), ValueError, "model_init"),
        (lambda f: make_trainer(f, all_positions=True, context_size=7).train(), ValueError, "context_size: .* 8 tok"),
    ],
)  # fmt: skip
def test_refusals(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path)


def test_packed_rows_are_refused(tmp_path):
    ids = torch.randint(0, 5, (4, 9)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": [list(range(9))] * 4}).with_format(
        "torch"
    )
    with pytest.raises(ValueError, match="position_ids: memories are of one sequence a row"):
        make_trainer(tmp_path, data=data).train()


def test_twice_with_the_best_kept(tmp_path):
    """A second `train` goes on with both networks; the best checkpoint brings its own teacher."""
    settings = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss"
    )
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, **settings)
    for _ in range(2):
        before = [p.clone() for p in trainer.losses.parameters()]
        trainer.train()
        assert not all(torch.equal(p, q) for p, q in zip(trainer.losses.parameters(), before, strict=True))
        best = trainer.state.best_model_checkpoint
        assert same(trainer.model, AutoModelForCausalLM.from_pretrained(best))
        assert same(trainer.teacher, load_teacher(best))


def test_predict_and_streamed_rows(tmp_path):
    trainer = make_trainer(tmp_path, data=dataclasses.replace(TASK, size=64).to_iterable().with_format("torch"))
    trainer.train()
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape == (10, 9, 5) and output.metrics["test_drift"] > 0


def test_rare_labels_and_padding_in_what_is_reported(tmp_path):
    """Terms are means over batches that have targets; the drift does not see padding."""
    rows = torch.randint(0, 4, (8, 9))
    mask = torch.ones_like(rows)
    mask[:, 5:] = 0
    found = []
    for pad in (0, 4):
        ids = rows.masked_fill(mask == 0, pad)
        labels = torch.full_like(rows, -100)
        labels[:4, 4] = ids[:4, 4]  # the second half has none
        data = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        data = Dataset.from_dict({name: x.tolist() for name, x in data.items()}).with_format("torch")
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, labelled_share=1.0, label_every=1)
        found.append(trainer.evaluate(data))
    assert found[0]["eval_drift"] == pytest.approx(found[1]["eval_drift"])
    assert found[0]["eval_drift_last"] == pytest.approx(found[1]["eval_drift_last"])
    assert found[0]["eval_decoder_first"] > 0.5 and found[0]["eval_readout"] > 0.5  # near ln 5, not halved by zeros


def test_a_frozen_teacher_learns_again(tmp_path):
    first = make_trainer(tmp_path)
    make_trainer(tmp_path, DMTTrainer, teacher=first.teacher)
    again = make_trainer(tmp_path, teacher=first.teacher)
    before = [p.clone() for p in again.teacher.parameters()]
    again.train()
    assert not any(torch.equal(p, q) for p, q in zip(again.teacher.parameters(), before, strict=True))


def test_an_optimizer_of_the_student_alone_is_refused(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    args = SMTConfig(**DEFAULTS | dict(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="optimizers: expected an optimizer of the teacher's parameters"):
        SMTTrainer(model, args, train_dataset=TASK, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="teacher: found none in"):
        make_trainer(tmp_path, teacher=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="teacher_hidden_size, teacher_heads: expected"):
        make_trainer(tmp_path, teacher_hidden_size=10)


def test_random_numbers_of_a_step_are_the_same_in_every_python(tmp_path):
    """Not by hash(), which is another where Python is."""
    trainer = make_trainer(tmp_path, seed=7)
    trainer.state.global_step = 5
    seeds = [trainer._generator().initial_seed() for _ in range(2)]
    assert seeds[0] == 921070050333812680 and seeds[1] != seeds[0]
