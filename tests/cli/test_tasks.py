"""`hf-rnn train --task` and `hf-rnn predict`, as a user runs them, on rows small enough to learn in seconds."""

import json
import random
import re

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

import hf_rnn
from hf_rnn.cli.main import main

SMALL = ["--config", "hidden_size=24,num_hidden_layers=1", "--use_cpu", "--held_out", "0.2", "--learning_rate", "2e-2"]
ANIMALS, THINGS = ["cat", "dog", "cow"], ["mat", "log", "rug"]


def sentences(count=80):
    choice = random.Random(0)
    return [(choice.choice(ANIMALS), choice.choice(THINGS)) for _ in range(count)]


def train(task, data, folder, steps, *more):
    arguments = ["train", "--task", task, "--data", str(data), "--output_dir", str(folder), "--max_steps", str(steps)]
    return main([*arguments, *SMALL, *more])


def predictions(capsys, *arguments):
    assert main(["predict", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_classes_of_texts(tmp_path, capsys):
    rows = [{"text": f"a {animal} on a {thing}", "label": animal} for animal, thing in sentences()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train("sequence-classification", tmp_path / "rows.jsonl", tmp_path / "out", 40) == 0
    told = capsys.readouterr().out
    assert "MinGRUForSequenceClassification" in told and "held-out accuracy: 1.0000" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "cow", "2": "dog"} and config["bidirectional"]
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "texts.txt").write_text("a dog on a mat\n\na cow on a rug\n")
    first, second = predictions(capsys, tmp_path / "out", "--data", tmp_path / "texts.txt", "--device", "cpu")
    assert first["text"] == "a dog on a mat" and first["answer"][0]["label"] == "dog"
    assert second["answer"][0]["label"] == "cow" and len(second["answer"]) == 3


def test_several_classes_and_class_labels(tmp_path, capsys):
    names = ClassLabel(names=["log", "mat", "rug", "none of these"])
    rows = {"body": [f"{t} and {u}" for t, u in zip(THINGS * 9, [*THINGS[1:], "mat"] * 7, strict=False)]}
    rows["kinds"] = [[w for w in row.split() if w in THINGS] for row in rows["body"]]
    features = Features({"body": Value("string"), "kinds": List(names)})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    columns = ["--text_column", "body", "--label_column", "kinds"]
    assert train("sequence-classification", tmp_path / "rows", tmp_path / "out", 2, *columns) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and len(config["id2label"]) == 4
    capsys.readouterr()
    (answer,) = predictions(capsys, tmp_path / "out", "mat and log", "--device", "cpu")
    assert {found["label"] for found in answer["answer"]} == set(config["label2id"])


def test_numbers(tmp_path, capsys):
    rows = [{"text": "x" * count, "label": count / 10} for count in range(1, 11)] * 8
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    assert train("regression", tmp_path / "rows.csv", tmp_path / "out", 60, "--model", "gru") == 0
    told = capsys.readouterr().out
    assert float(told.split("held-out rmse: ")[1].split()[0]) < 0.2 and "held-out r2" in told
    (answer,) = predictions(capsys, tmp_path / "out", "xxxxx", "--device", "cpu")
    assert abs(answer["answer"][0]["score"] - 0.5) < 0.3


def test_labels_of_words(tmp_path, capsys):
    rows = {"tokens": [["the", a, "saw", "the", t, "!"] for a, t in sentences()]}
    rows["tags"] = [["O", "ANIMAL", "O", "O", "THING", "O"]] * 80
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    columns = ["--text_column", "tokens", "--label_column", "tags"]
    assert train("token-classification", tmp_path / "rows", tmp_path / "out", 60, *columns) == 0
    assert "held-out accuracy: 1.0000" in capsys.readouterr().out
    output = tmp_path / "answers.jsonl"
    assert main(["predict", str(tmp_path / "out"), "the cow saw the rug !", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["answer"]
    assert [(x["entity"], x["word"], x["start"], x["end"]) for x in found] == [
        ("O", "the", 0, 3),
        ("ANIMAL", "cow", 4, 7),
        ("O", "saw", 8, 11),
        ("O", "the", 12, 15),
        ("THING", "rug", 16, 19),
        ("O", "!", 20, 21),
    ]
    assert all(0 < x["score"] <= 1 for x in found)
    # Neighbours of one class stay two words; spaces have no answer
    assert main(["predict", str(tmp_path / "out"), "  cow dog   rug  ", "--output", str(output)]) == 0
    assert [x["word"] for x in json.loads(output.read_text())["answer"]] == ["cow", "dog", "rug"]


def test_a_checkpoint_with_other_labels_gets_a_new_head(tmp_path, capsys):
    """A tagger of four classes becomes one of three, and a classifier of two."""
    config = hf_rnn.GRUConfig(hidden_size=16, num_hidden_layers=1, num_labels=4)
    hf_rnn.GRUForTokenClassification(config).save_pretrained(tmp_path / "tagger")
    hf_rnn.byte_tokenizer().save_pretrained(tmp_path / "tagger")
    words = [{"text": ["one", "two"], "label": ["a", "b"]}, {"text": ["three"], "label": ["c"]}] * 4
    texts = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}] * 4
    for task, rows, labels in (("token-classification", words, 3), ("sequence-classification", texts, 2)):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = ["--task", task, "--model", tmp_path / "tagger", "--data", tmp_path / "rows.jsonl", "--use_cpu"]
        arguments += ["--max_steps", 1, "--output_dir", tmp_path / task]
        assert main(["train", *map(str, arguments)]) == 0
        assert len(json.loads((tmp_path / task / "config.json").read_text())["id2label"]) == labels


def test_names_of_several_words(tmp_path, capsys):
    """A model that says "B-X" in upper case, "I-X" of digits, "O" of others, known by the byte: no training."""
    config = hf_rnn.MinGRUConfig(hidden_size=259, num_hidden_layers=1, id2label={0: "O", 1: "B-X", 2: "I-X"})
    model = hf_rnn.MinGRUForTokenClassification(config)
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(259))
        model.model.norm.weight.fill_(1.0)
        model.score.bias[0] = 1.0
        model.score.weight[1, ord("A") : ord("Z") + 1] = 5.0
        model.score.weight[2, ord("0") : ord("9") + 1] = 5.0
    model.save_pretrained(tmp_path)
    hf_rnn.byte_tokenizer().save_pretrained(tmp_path)
    text = "a éA x1  y2 zB C é7 b"  # a word is what its last byte is; names of three words, of one, and of two
    (found,) = predictions(capsys, tmp_path, text, "--device", "cpu")
    assert [(x["entity_group"], x["word"]) for x in found["answer"]] == [
        ("X", "éA x1  y2"),
        ("X", "zB"),
        ("X", "C é7"),
    ]
    assert all(text[x["start"] : x["end"]] == x["word"] for x in found["answer"])


def test_masked_bytes(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    more = ["--block_size", "48", "--model", "minlstm"]
    assert train("masked-lm", tmp_path / "text.txt", tmp_path / "out", 60, *more) == 0
    told = capsys.readouterr().out
    assert float(told.split("held-out accuracy: ")[1].split()[0]) > 0.8 and "'a text <|mask|>'" in told
    (answer,) = predictions(capsys, tmp_path / "out", "the cat s<|mask|>t on the mat.", "--device", "cpu")
    assert answer["answer"][0]["token_str"] == "a"
    assert main(["predict", str(tmp_path / "out"), "no mask", "--device", "cpu"]) == 1
    assert "expected <|mask|> in each, got 'no mask'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task", "tagging"], "task: expected one of"),
        (["--task", "regression", "--trainer", "zo"], "trainer: regression trains by backpropagation"),
        (["--task", "regression"], "label_column: expected a finite number"),
        (["--task", "regression", "--label_column", "y"], "label_column: .* got 'y'"),
        (["--task", "token-classification"], "expected a list of words"),
        (
            ["--task", "sequence-classification", "--text_column", "label", "--label_column", "text"],
            "text_column: expec",
        ),
        (
            ["--task", "sequence-classification", "--data", "one"],
            r"label_column: expected at least two classes, got \['x'\] alone",
        ),
        (["--task", "regression", "--stream"], "stream: expected --task causal-lm"),
        (["--task", "masked-lm", "--tokenizer", "bytes"], "tokenizer: masked-lm needs a mask token"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    hf_rnn.byte_tokenizer().save_pretrained("bytes")
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", None]}).save_to_disk("rows")
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", "x"]}).save_to_disk("one")
    assert main(["train", "--data", "rows", "--output_dir", "out", *more]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_predict_says_what_it_takes(tmp_path, capsys):
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    for arguments, message in (
        (["a text"], "got GRUForCausalLM; hf-rnn generate"),
        ([], "texts, data: expected either texts"),
        (["a", "--data", "b"], "either texts on the command line or --data"),
    ):
        assert main(["predict", str(tmp_path), *arguments, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    hf_rnn.GRUForTokenClassification(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert main(["predict", str(tmp_path), "a text", "", "--device", "cpu"]) == 1
    assert "expected texts, got one that is empty" in capsys.readouterr().err
    config = hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1, num_input_features=3)
    hf_rnn.GRUForTokenClassification(config).save_pretrained(tmp_path)
    assert main(["predict", str(tmp_path), "a text", "--device", "cpu"]) == 1
    assert "expected a model of texts, got one that reads input_features" in capsys.readouterr().err
