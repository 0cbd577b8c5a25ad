"""Strings of digits against the images that they are made of; batches; transcriptions against other ways to count."""

import itertools
import sys
from functools import cache

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_rnn import GRUConfig, GRUForCTC
from hf_rnn.tasks import DigitStrings, best_path, digit_rows, digits, error_rate, pad_features


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_the_same_images_as_tokens(split):
    rows, tokens = digit_rows(split), digits(split, levels=17, classify=True)
    assert torch.equal(rows["labels"][:], tokens["labels"][:])
    levels = (rows["input_features"][:] * 16).long().clamp(max=16)
    assert (levels.flatten(1) * 17 // 16).clamp(max=16).equal(tokens["input_ids"][:][:, 1:])


def digits_of(features: torch.Tensor, images: torch.Tensor, values: torch.Tensor, count: int) -> set[tuple]:
    """Every reading of the columns as images with gaps of empty columns between."""
    columns = features.T
    known: dict[bytes, set[int]] = {}
    for image, value in zip(images, values, strict=True):
        known.setdefault(image.numpy().tobytes(), set()).add(int(value))

    @cache
    def readings(at: int, left: int) -> frozenset:
        if left == 0:
            return frozenset([()] if not columns[:, at:].any() else [])
        found = set()
        for value in known.get(columns[:, at : at + 8].contiguous().numpy().tobytes(), ()):
            found |= {(value, *rest) for rest in readings(at + 8, left - 1)}
        if at < columns.shape[1] and not columns[:, at].any():
            found |= readings(at + 1, left)
        return frozenset(found)

    return set(readings(0, count))


@pytest.mark.parametrize("split, count, gap", [("train", 5, 4), ("test", 1, 3), ("test", 3, 0)])
def test_strings(split, count, gap):
    task, images = DigitStrings(split, digits=count, max_gap=gap, seed=2), digit_rows(split)
    pixels, values = images["input_features"][:], images["labels"][:]
    lengths = set()
    for n in range(20):
        row = task[n]
        assert row["input_features"].dtype == torch.float32 and row["labels"].shape == (count,)
        assert tuple(row["labels"].tolist()) in digits_of(row["input_features"], pixels, values, count)
        lengths.add(len(row["input_features"]))
    assert min(lengths) >= 8 * count and max(lengths) <= 8 * count + gap * (count + 1)
    assert len(lengths) == 1 if gap == 0 else len(lengths) > 2


def test_rows_are_a_function_of_seed_and_index():
    task = DigitStrings(size=20)
    assert torch.equal(task[3]["input_features"], task[-17]["input_features"]) and len(task) == 20
    assert any(task[n]["labels"].tolist() != DigitStrings(seed=1)[n]["labels"].tolist() for n in range(3))
    with pytest.raises(IndexError, match="index: expected one of 20 rows"):
        task[20]


@pytest.mark.parametrize("settings", [dict(size=0), dict(seed=-1), dict(digits=0), dict(max_gap=-1), dict(split="x")])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
        DigitStrings(**settings)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for make in (DigitStrings, digit_rows):
        with pytest.raises(ImportError, match=r"pip install 'hf-rnn\[tasks\]'"):
            make()


def test_batches():
    rows = [{"input_features": torch.ones(t, 2), "labels": torch.arange(k)} for t, k in ((3, 2), (1, 3))]
    batch = pad_features(rows)
    assert batch["input_features"].tolist() == [[[1, 1]] * 3, [[1, 1], [0, 0], [0, 0]]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, -100], [0, 1, 2]]


def test_best_path():
    """Every path of five steps: its labels stand where it changes to one."""
    paths = torch.tensor(list(itertools.product(range(3), repeat=5)))
    logits = torch.nn.functional.one_hot(paths, 3).float()
    for blank in (0, 2):
        for path, read in zip(paths.tolist(), best_path(logits, blank), strict=True):
            changes = [b for a, b in zip([None, *path], path, strict=False) if a != b]
            assert read == [label for label in changes if label != blank]
    mask = torch.tensor([[0, 1, 1, 1, 0]]).expand(len(paths), -1)
    assert best_path(logits, 2, mask) == best_path(logits[:, 1:4], 2)


def test_error_rate():
    """Beside the recursion that defines it."""

    @cache
    def edits(x: tuple, y: tuple) -> int:
        if not x or not y:
            return len(x) + len(y)
        return min(edits(x[1:], y) + 1, edits(x, y[1:]) + 1, edits(x[1:], y[1:]) + (x[0] != y[0]))

    random = np.random.default_rng(0)
    found, expected = ([tuple(random.integers(3, size=random.integers(6))) for _ in range(30)] for _ in range(2))
    assert error_rate(found, expected) == sum(map(edits, found, expected)) / sum(map(len, expected))
    assert error_rate(["sitting"], ["kitten"]) == 0.5
    for bad in ((["a"], []), ([""], [""])):
        with pytest.raises(ValueError, match="found, expected"):
            error_rate(*bad)


def test_a_model_learns_to_read(tmp_path):
    """By transformers' Trainer, as it is: two digits apart, well above what the loss of blanks alone gives."""
    torch.manual_seed(0)
    task = DigitStrings(digits=2, size=4096)
    config = GRUConfig(
        vocab_size=11, pad_token_id=10, num_input_features=8, hidden_size=32, num_hidden_layers=1, bidirectional=True,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    model = GRUForCTC(config)
    options = dict(max_steps=120, learning_rate=2e-2, per_device_train_batch_size=32, report_to="none", use_cpu=True)
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=task, data_collator=pad_features).train()
    test = DigitStrings("test", digits=2)
    batch = pad_features([test[n] for n in range(100)])
    labels = batch.pop("labels")
    with torch.no_grad():
        read = best_path(model.eval()(**batch).logits, config.pad_token_id, batch["attention_mask"])
    assert error_rate(read, labels.tolist()) < 0.5
