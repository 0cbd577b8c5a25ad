"""Every label against a solver that sees input_ids alone; rows are a function of (seed, index)."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from transformers import EvalPrediction

from hf_rnn import tasks


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
    count = min(task.keys, len(x) // 3)
    for t, token in enumerate(x):
        if t < 2 * count:
            if token >= first:
                key = token
            else:
                pairs[key] = token
        elif token >= first:
            answers[t] = pairs[token]
    assert len(pairs) == len(answers) == count
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


def test_rows_are_a_function_of_seed_and_index(cls):
    task, again, other = cls(seed=1), cls(seed=1), cls(seed=2)
    some = [5, 0, len(task) - 1]
    assert all(torch.equal(task[i]["input_ids"], again[i]["input_ids"]) for i in some)
    assert not all(torch.equal(task[i]["input_ids"], other[i]["input_ids"]) for i in some)
    assert torch.equal(task[-1]["input_ids"], task[len(task) - 1]["input_ids"])
    with pytest.raises(IndexError, match="one of"):
        task[len(task)]


def test_rows_cost_nothing_before_they_are_asked_for(cls):
    start = time.perf_counter()
    task = cls(size=10**12)
    assert len(task) == 10**12 and len(task[10**12 - 1]["input_ids"]) == 33
    assert time.perf_counter() - start < 5


def test_as_datasets(cls):
    task = cls(size=7)
    rows = list(task.to_iterable())
    assert len(rows) == 7 and rows[6]["labels"] == task[6]["labels"].tolist()


def test_vocabulary_does_not_depend_on_length(cls):
    assert cls(length=16).vocab_size == cls(length=64).vocab_size


def test_answers_are_balanced():
    labels = np.array([int(tasks.Retrieval(length=16)[i]["labels"][-1]) for i in range(4000)])
    counts = np.bincount(labels, minlength=9)[1:]
    assert counts.sum() == 4000 and abs(counts / 4000 - 1 / 8).max() < 0.03


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.Retrieval(length=2), "length: expected a whole number of at least 4, got 2"),
        (lambda: tasks.Stack(depth=0), "depth"),
        (lambda: tasks.Parity(seed=-1), "seed"),
        (lambda: tasks.KeysValues(keys=1.5), "keys"),
        (lambda: tasks.SelectiveCopying(length=7), "length: expected at least 8"),
        (lambda: tasks.digits("valid"), "split: expected 'train' or 'test'"),
        (lambda: tasks.digits(levels=1), "levels"),
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


def test_digits():
    train, test = tasks.digits("train", levels=4), tasks.digits("test", levels=4)
    assert (len(train), len(test)) == (1437, 360)
    row = test[0]["input_ids"]
    assert row.shape == (65,) and row[0] == 4 and int(row[1:].min()) >= 0 and int(row[1:].max()) == 3
    assert torch.equal(test[0]["input_ids"], tasks.digits("test", levels=4)[0]["input_ids"])
    assert tasks.to_image(row, 4).shape == (8, 8) and tasks.to_image(row[1:], 4).max() == 1


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
