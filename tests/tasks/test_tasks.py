"""Every label against a solver that sees input_ids alone; rows are a function of (seed, index)."""

import dataclasses
import sys
from statistics import mode

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, tasks


def retrieval(task, x):
    at = x.index(0)
    return {len(x) - 1: x[at + 1]}


def string_copy(task, x):
    half = len(x) // 2
    string = x[len(x) % 2 : len(x) % 2 + half]
    assert x[len(x) % 2 + half] == 0
    return {len(x) - half + i: string[half - 1 - i] for i in range(half)}


def stack(task, x):
    held, answers = [], {}
    for t, token in enumerate(x):
        if token:
            held.append(token)
            assert len(held) <= task.depth
        else:
            answers[t] = held.pop()
    return answers


def keys_values(task, x):
    pairs, key = {}, None
    answers, first = {}, 1 + task.values
    count = min(task.keys, (len(x) - 1) // 2 if task.one_query else len(x) // 3)
    for t, token in enumerate(x):
        if t < 2 * count:
            if token >= first:
                key = token
            else:
                pairs[key] = token
        elif token >= first:
            answers[t] = pairs[token]
    assert len(pairs) == count and len(answers) == (1 if task.one_query else count)
    return answers


def linear_rule(task, x):
    """All rules tried on all pairs."""
    answers, p = {}, task.modulus
    for t in range(0, len(x), 2):
        pairs = [(x[i], x[i + 1]) for i in range(0, t, 2)]
        rules = [(a, b) for a in range(p) for b in range(p) if all((a * u + b) % p == v for u, v in pairs)]
        said = {(a * x[t] + b) % p for a, b in rules}
        assert said and (t + 1 == len(x) or x[t + 1] in said)
        if len(said) == 1:
            answers[t] = said.pop()
    return answers


def modular_arithmetic(task, x):
    answers, text = {}, str(x[0])
    for t in range(0, len(x), 2):
        if t:
            text = f"({text} {'+-*'[x[t - 1] - task.modulus]} {x[t]})"
        answers[t] = eval(text) % task.modulus
    return answers


def parity(task, x):
    answers = {t: x[: t + 1].count(1) % 2 for t in range(len(x))}
    return {len(x) - 1: answers[len(x) - 1]} if task.last_only else answers


def selective_copying(task, x):
    symbols = [token for token in x if 0 < token <= task.symbols]
    return {len(x) - task.copied + i: symbol for i, symbol in enumerate(symbols)}


SOLVERS = {
    tasks.Retrieval: retrieval,
    tasks.StringCopy: string_copy,
    tasks.Stack: stack,
    tasks.KeysValues: keys_values,
    tasks.LinearRule: linear_rule,
    tasks.ModularArithmetic: modular_arithmetic,
    tasks.Parity: parity,
    tasks.SelectiveCopying: selective_copying,
}


@pytest.fixture(params=SOLVERS, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.mark.parametrize("length", [8, 13, 32, 128])
def test_labels(cls, length):
    task = cls(length=length, seed=3)
    for i in range(40):
        row = task[i]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        assert len(ids) == len(labels) == length + 1
        expected = SOLVERS[cls](task, ids[:-1])
        assert {t - 1: y for t, y in enumerate(labels) if y != -100} == expected
        assert min(ids) >= 0 and max(ids) < task.vocab_size


def test_last_only_parity():
    task = tasks.Parity(length=9, last_only=True)
    assert [t for t, y in enumerate(task[0]["labels"].tolist()) if y != -100] == [9]


@pytest.mark.parametrize("length", [4, 8, 13, 32])
def test_one_query(length):
    task = tasks.KeysValues(length=length, one_query=True)
    for i in range(40):
        row = task[i]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        found = {t - 1: y for t, y in enumerate(labels) if y != -100}
        assert found == keys_values(task, ids[:-1]) and [*found] == [length - 1]


@pytest.mark.parametrize("cls", [tasks.Retrieval, tasks.StringCopy])
def test_noise_is_in_answers_alone(cls):
    clean, noisy, count, wrong = cls(length=16), cls(length=16, noise=0.3), 0, 0
    for i in range(400):
        ids, labels = clean[i]["input_ids"][:-1], clean[i]["labels"]
        assert torch.equal(noisy[i]["input_ids"][:-1], ids)
        given, asked = noisy[i]["labels"], labels != -100
        assert torch.equal(given != -100, asked) and given[asked].min() > 0 and given.max() < clean.vocab_size
        count, wrong = count + int(asked.sum()), wrong + int((given != labels).sum())
    assert wrong / count == pytest.approx(0.3 * (clean.symbols - 1) / clean.symbols, abs=0.06)


def test_rows_are_a_function_of_seed_and_index(cls):
    task, again, other = cls(seed=1), cls(seed=1), cls(seed=2)
    some = [5, 0, len(task) - 1]
    assert all(torch.equal(task[i]["input_ids"], again[i]["input_ids"]) for i in some)
    assert not all(torch.equal(task[i]["input_ids"], other[i]["input_ids"]) for i in some)
    assert torch.equal(task[-1]["input_ids"], task[len(task) - 1]["input_ids"])
    for beyond in (len(task), -len(task) - 1):
        with pytest.raises(IndexError, match="one of"):
            task[beyond]


def test_rows_cost_nothing_before_they_are_asked_for(cls):
    task = cls(size=10**12)  # more than any memory holds
    assert len(task) == 10**12 and len(task[10**12 - 1]["input_ids"]) == 33


def test_as_datasets(cls):
    task = cls(size=7)
    rows = list(task.to_iterable())
    assert len(rows) == 7 and rows[6]["labels"] == task[6]["labels"].tolist()


def test_shuffled_over_processes(cls):
    task = cls(length=8, size=6)
    batches = list(DataLoader(task, batch_size=3, shuffle=True, num_workers=2 if cls is tasks.Parity else 0))
    rows = sorted(row.tolist() for batch in batches for row in batch["input_ids"])
    assert rows == sorted(task[i]["input_ids"].tolist() for i in range(6))


def test_vocabulary_does_not_depend_on_length(cls):
    assert cls(length=16).vocab_size == cls(length=64).vocab_size


def test_answers_are_balanced():
    labels = np.array([int(tasks.Retrieval(length=16)[i]["labels"][-1]) for i in range(4000)])
    counts = np.bincount(labels, minlength=9)[1:]
    assert counts.sum() == 4000 and abs(counts / 4000 - 1 / 8).max() < 0.03


def share_right(task, guess):
    right = []
    for i in range(500):
        row = task[i]
        x, labels = row["input_ids"].tolist(), row["labels"].tolist()
        right += [guess(x[: t + 1]) == label for t, label in enumerate(labels[1:]) if label != -100]
    return np.mean(right)


def test_simple_rules():
    """What a docstring says that can be had without what the task is about."""
    assert 0.67 < share_right(tasks.Stack(), lambda x: next(token for token in x[::-1] if token)) < 0.77
    assert 0.23 < share_right(tasks.ModularArithmetic(), lambda x: 0) < 0.29
    assert 0.37 < share_right(tasks.StringCopy(length=24), lambda x: mode(x[: x.index(0)])) < 0.43
    assert 0.30 < share_right(tasks.StringCopy(length=96), lambda x: mode(x[: x.index(0)])) < 0.36
    assert 0.29 < share_right(tasks.KeysValues(), lambda x: mode([token for token in x if 0 < token <= 8])) < 0.37
    assert 0.33 < share_right(tasks.LinearRule(), lambda x: mode(x[1::2])) < 0.40
    assert 0.36 < share_right(tasks.SelectiveCopying(), lambda x: mode([token for token in x if 0 < token <= 8])) < 0.46


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.Retrieval(length=2), "length: expected a whole number of at least 4, got 2"),
        (lambda: tasks.Stack(depth=0), "depth"),
        (lambda: tasks.Parity(seed=-1), "seed"),
        (lambda: tasks.KeysValues(keys=1.5), "keys"),
        (lambda: tasks.Retrieval(noise=1.5), r"noise: expected a share in \[0, 1\], got 1.5"),
        (lambda: tasks.Retrieval(length=True), "length"),
        (lambda: tasks.Parity(last_only="no"), "last_only: expected True or False"),
        (lambda: tasks.SelectiveCopying(length=7), "length: expected at least 8"),
        (lambda: tasks.digits("valid"), "split: expected 'train' or 'test'"),
        (lambda: tasks.digits(levels=1), "levels: expected 2 to 17, got 1"),
        (lambda: tasks.digits(levels=18), "levels: expected 2 to 17, got 18"),
        (lambda: tasks.image_sequences("nowhere", levels=257), "levels: expected 2 to 256, got 257"),
        (lambda: tasks.image_sequences("nowhere", side=0), "side: expected at least 1, got 0"),
        (lambda: tasks.to_image(np.zeros((2, 7)), 4), "input_ids: expected the pixels of a square"),
        (lambda: tasks.accuracy(np.zeros((2, 3)), np.zeros((2, 4))), "predictions, labels: expected"),
        (lambda: tasks.accuracy(np.zeros((2, 3)), np.full((2, 3), -100)), "labels: expected some"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_accuracy():
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 3, -100, -100], [-100, -100, -100, -100]])
    predictions = torch.tensor([[1, 0, 9, 9], [3, 9, 9, 9], [0, 0, 0, 0]])
    expected = {"accuracy": pytest.approx(2 / 3), "exact_match": 0.5}
    assert tasks.accuracy(predictions, labels) == expected
    logits = torch.nn.functional.one_hot(predictions, 10).float()
    assert tasks.accuracy(logits, labels) == expected
    kept = tasks.preprocess_logits_for_metrics(logits, labels)
    assert tasks.compute_metrics(EvalPrediction(kept.numpy(), labels.numpy())) == expected
    assert tasks.compute_metrics(EvalPrediction((logits.numpy(), np.zeros(3)), labels.numpy())) == expected
    for x in (logits.bfloat16(), logits.requires_grad_(), logits.detach().numpy()):  # a model's own output, too
        assert tasks.accuracy(x, labels) == expected


@pytest.mark.parametrize("preprocess", [None, tasks.preprocess_logits_for_metrics])
def test_metrics_of_the_trainer(tmp_path, preprocess):
    """Rows of two lengths, one a batch, so that Trainer pads both predictions and labels."""
    rows = [tasks.Parity(length=length, seed=1)[i] for i in range(4) for length in (6, 9)]
    torch.manual_seed(0)
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1))
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True)
    trainer = Trainer(
        model, args, compute_metrics=tasks.compute_metrics, preprocess_logits_for_metrics=preprocess, eval_dataset=rows
    )
    found = trainer.evaluate()
    right = []
    for row in rows:
        with torch.no_grad():
            said = model.eval()(row["input_ids"][None]).logits[0].argmax(-1).tolist()
        right.append([a == b for a, b in zip(said[:-1], row["labels"].tolist()[1:], strict=True)])
    assert found["eval_accuracy"] == pytest.approx(np.mean(np.concatenate(right)))
    assert found["eval_exact_match"] == np.mean([all(r) for r in right])


def test_digits():
    train, test = tasks.digits("train", levels=4), tasks.digits("test", levels=4)
    assert (len(train), len(test)) == (1437, 360)
    row = test[0]["input_ids"]
    assert row.shape == (65,) and row[0] == 4 and int(row[1:].min()) >= 0 and int(row[1:].max()) == 3
    assert torch.equal(test[0]["input_ids"], tasks.digits("test", levels=4)[0]["input_ids"])
    assert tasks.to_image(row, 4).shape == (8, 8) and tasks.to_image(row[1:], 4).max() == 1


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-rnn\[tasks\]'"):
        tasks.digits()


def test_images_of_a_folder(tmp_path):
    images = [np.full((6, 6), value, np.uint8) for value in (0, 100, 255)]
    data = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
    data.save_to_disk(tmp_path / "saved")
    for i, image in enumerate(data["image"]):
        (tmp_path / "files" / "train").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "files" / "train" / f"{i}.png")
    for folder in ("saved", "files"):
        rows = tasks.image_sequences(str(tmp_path / folder), side=3, levels=5)
        assert [row["input_ids"].tolist() for row in rows] == [[5] + [v] * 9 for v in (0, 1, 4)]
    with pytest.raises(ValueError, match="column: .* got 'x'"):
        tasks.image_sequences(str(tmp_path / "saved"), column="x")
    with pytest.raises(ValueError, match="split: .* got 'test'"):
        tasks.image_sequences(str(tmp_path / "files"), "test")


def test_longer_rows_of_the_same_task():
    task = tasks.Retrieval(length=8)
    assert dataclasses.replace(task, length=32)[0]["input_ids"].shape == (33,)
