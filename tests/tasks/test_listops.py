"""Every value by a reader of the text that the tokens stand for; rows are a function of (seed, index)."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_rnn import MinGRUConfig, MinGRUForSequenceClassification
from hf_rnn.tasks import ListOps, digits

WORDS = ["", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]


def parse(words: list[str], at: int = 0) -> tuple[int, int]:
    """The value of the expression at `at`, and where it ends."""
    if words[at].isdigit():
        return int(words[at]), at + 1
    operation, at, values = words[at], at + 1, []
    while words[at] != "]":
        found, at = parse(words, at)
        values.append(found)
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) // 2  # rounded down
    answers = {"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": middle, "[SM": sum(values) % 10}
    return answers[operation], at + 1


@pytest.mark.parametrize(
    "settings", [dict(min_length=5, max_length=60), dict(min_length=30, max_length=90, max_depth=3)]
)
def test_values(settings):
    task, depths = ListOps(seed=1, **settings), set()
    for n in range(100):
        row = task[n]
        words = [WORDS[token] for token in row["input_ids"].tolist()]
        assert settings["min_length"] <= len(words) <= settings["max_length"]
        assert parse(words) == (int(row["labels"]), len(words))
        opened = torch.tensor([(word[0] == "[") - (word == "]") for word in words]).cumsum(0)
        depths.add(int(opened.max()))
        assert opened[:-1].min() > 0 and opened[-1] == 0
    most = settings.get("max_depth", 10) - 1  # the last level has digits alone
    assert min(most, 4) <= max(depths) <= most


def test_rows_are_a_function_of_seed_and_index():
    task = ListOps(min_length=5, max_length=60, size=20)
    assert torch.equal(task[3]["input_ids"], task[-17]["input_ids"]) and len(task) == 20
    other = ListOps(min_length=5, max_length=60, size=20, seed=1)
    assert any(task[n]["input_ids"].tolist() != other[n]["input_ids"].tolist() for n in range(5))
    with pytest.raises(IndexError, match="index: expected one of 20 rows"):
        task[20]


@pytest.mark.parametrize(
    "settings", [dict(size=0), dict(seed=-1), dict(max_depth=1), dict(max_arguments=1), dict(max_length=3)]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ListOps(**settings)


def test_lengths_that_no_expression_comes_to():
    with pytest.raises(ValueError, match="min_length: expected a length that expressions of depth 2"):
        ListOps(max_depth=2)[0]


def test_a_classifier_learns_digits(tmp_path):
    """By transformers' Trainer, as it is: far above chance after a hundred steps."""
    torch.manual_seed(0)
    data, test = (digits(split, levels=16, classify=True) for split in ("train", "test"))
    assert set(data["labels"][:].tolist()) == set(range(10)) and data["input_ids"][:].shape == (1437, 65)
    sizes = dict(vocab_size=17, hidden_size=32, num_hidden_layers=1, num_labels=10)
    model = MinGRUForSequenceClassification(MinGRUConfig(**sizes))
    options = dict(max_steps=120, learning_rate=1e-2, per_device_train_batch_size=32, report_to="none", use_cpu=True)
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=data).train()
    with torch.no_grad():
        right = model.eval()(input_ids=test["input_ids"][:]).logits.argmax(-1) == test["labels"][:]
    assert right.double().mean() > 0.4
