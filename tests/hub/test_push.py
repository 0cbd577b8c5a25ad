"""Uploads and downloads against a Hub on this machine, each in a process of its own."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump
from safetensors.torch import load
from transformers import Trainer

import hf_rnn
from hf_rnn_trainers.model_card.files import others

PUSH = """
import contextlib, io, json, os, urllib.request
import torch, hf_rnn
from pathlib import Path
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import TrainingArguments, default_data_collator
from hf_rnn.cli.main import main

def small(stem):
    torch.manual_seed(0)
    config = getattr(hf_rnn, stem + "Config")(hidden_size=16, num_hidden_layers=1)
    return getattr(hf_rnn, stem + "ForCausalLM")(config).eval()

tokenizer = hf_rnn.byte_tokenizer()
rows = [{"input_ids": torch.arange(10 * n, 10 * n + 24), "labels": torch.arange(10 * n, 10 * n + 24)} for n in range(4)]

model = small("MinGRU")
model.save_pretrained("first")
model.push_to_hub("model")
tokenizer.push_to_hub("model")
first = HfApi().model_info("me/model").sha
model.lm_head.weight.data.mul_(2)
model.save_pretrained("second")
model.push_to_hub("model", revision="second")

def run(trainer_class, config_class, model, name, **options):
    args = config_class(
        output_dir=name, push_to_hub=True, hub_model_id=name, hub_strategy="every_save", max_steps=3, save_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to="none", **options,
    )
    data = dict(train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)
    trainer = trainer_class(model, args, processing_class=tokenizer, **data)
    trainer.train()
    trainer.evaluate()
    return trainer

run(hf_rnn.RecurrentTrainer, TrainingArguments, small("GRU"), "trained").push_to_hub(
    license="mit", language="en", dataset_tags="me/numbers"
)
base = small("LSTM")
base.save_pretrained("base")
run(hf_rnn.ZOTrainer, hf_rnn.ZOConfig, base, "zo", num_directions=4).push_to_hub()

coded = small("XLSTM")
print(hf_rnn.save_compressed(coded, "coded", step=2**-8))
coded.save_pretrained("plain")
tokenizer.save_pretrained("coded")
assert main(["push", "coded", "coded", "--private"]) == 0
gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61, n_positions=32))
hf_rnn.save_compressed(gpt2, "gpt2", step=2**-8)
gpt2.save_pretrained("plain-gpt2")
assert main(["push", "gpt2", "gpt2"]) == 0

folder = Path("folder")
small("MemoryRNN").save_pretrained(folder)
tokenizer.save_pretrained(folder)
for name in ("checkpoint-7/model.safetensors", "checkpoint-7/optimizer.pt", "training_args.bin", "optimizer.pt",
             "old/checkpoint-8/config.json", "_non_finite_batch.safetensors", "notes.txt", "data.pkl", "secret.env",
             "users.jsonl", "data/users.json", "data/model.safetensors", "corpus.txt", "scan.png", "private.md"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((folder / "model.safetensors").read_bytes() if ".safe" in name else b"x")
assert main(["push", "folder", "me/folder", "--revision", "v1", "--license", "apache-2.0"]) == 0

def faults(**faults):
    data = json.dumps(faults).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", data, method="POST"))

def refused(*arguments):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(["push", *arguments])
    return status, error.getvalue()

messages = {}
for fault, settings in {
    "forbidden": dict(refuse={"create": 403}),
    "corrupted": dict(corrupt_lfs=True),
    "crash": dict(refuse={"commit": 500}),
    "once": dict(refuse={"lfs": 503}, times=1),
}.items():
    weight = torch.nn.init.normal_(model.lm_head.weight.data)  # bytes that the Hub has not yet
    model.save_pretrained("again")
    faults(**settings)
    messages[fault] = refused("again", fault)
faults()
Path("folder/README.md").write_text("no metadata")
messages["card"] = refused("folder", "bad")
Path("again/model.safetensors").write_bytes(Path("again/model.safetensors").read_bytes()[:-9])
messages["weights"] = refused("again", "bad")
messages["config"] = refused("old", "bad")
print("MESSAGES", json.dumps(messages))

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

for name, local, revision in [
    ("model", "first", None), ("model", "second", "second"), ("model", "first", first),
    ("trained", "trained", None), ("zo", "zo", None), ("coded", "plain", None), ("folder", "folder", "v1"),
    ("gpt2", "plain-gpt2", None),
]:
    fetched = AutoModelForCausalLM.from_pretrained("me/" + name, revision=revision)
    assert type(fetched).__module__.startswith(("hf_rnn.", "transformers.models.")), type(fetched)
    assert same(fetched, type(fetched).from_pretrained(local)), (name, revision)
    print("SAME", name)
replayed = hf_rnn.ZOTrainer.replay("base", "me/zo")
assert same(replayed, AutoModelForCausalLM.from_pretrained("me/zo")) and not same(replayed, small("LSTM"))
assert AutoTokenizer.from_pretrained("me/model")("ab").input_ids == tokenizer("ab").input_ids
print("SNIPPET", end=" ")
exec(ModelCard.load("me/model").text.split("```python")[1].split("```")[0])
"""
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM

for name, trusted in (("coded", True), ("gpt2", None), ("model", None)):
    try:
        AutoModelForCausalLM.from_pretrained("me/" + name, trust_remote_code=trusted)
    except (ImportError, ValueError) as error:
        print("REFUSED", str(error).replace(chr(10), " "))

model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)
both = dict(revision="second", code_revision="second")
pinned = AutoModelForCausalLM.from_pretrained("me/model", **both, trust_remote_code=True)
assert torch.equal(pinned.lm_head.weight, 2 * model.lm_head.weight)
ids = torch.arange(9)[None]
torch.testing.assert_close(pinned(ids).logits, 2 * model(ids).logits)
assert model.generate(ids, max_new_tokens=5).shape == (1, 14)
for name in ("trained", "zo"):
    AutoModelForCausalLM.from_pretrained("me/" + name, trust_remote_code=True)(ids, labels=ids).loss.backward()
assert not any(name.startswith("hf_rnn") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, fake_hub, python):
    """The folder and output of a process that has pushed everything."""
    folder = tmp_path_factory.mktemp("push")
    result = python(PUSH, folder, **fake_hub.environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_what_is_there(pushed, fake_hub):
    whole = {"config.json", "generation_config.json", "model.safetensors", "README.md", "modeling_hf_rnn.py"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    for name, more in {"model": set(), "trained": {".eval_results/hf_rnn.yaml"}, "zo": {"zo_replay.jsonl"}}.items():
        names = set(fake_hub.files(f"me/{name}"))
        assert names >= whole | tokenizer | more
        assert not any("checkpoint-" in n or "optimizer" in n for n in names)
    assert set(fake_hub.files("me/folder", "v1")) == whole | tokenizer, "nobody's texts and lists"
    assert not fake_hub.files("me/folder"), "only the branch was asked for"
    assert fake_hub.repositories["me/coded"].private and not fake_hub.repositories["me/model"].private
    assert fake_hub.requests["lfs"] >= 5 and fake_hub.requests["verify"] >= 5


def test_trainers_push_no_texts_either(tmp_path, monkeypatch):
    """Trainer uploads all of output_dir: told before it trains, and passed over where a file came later."""
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=16, num_hidden_layers=1))
    settings = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for name in ("training_args.bin", "runs/now/events.out.tfevents.1", "eval_results.json", "checkpoint-1/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert others(tmp_path) == []
    for name in ("runs/corpus.txt", "runs/now/users.json", "data/users_results.json", ".cache/private.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert others(tmp_path) == [name]
        (tmp_path / name).unlink()
    trainer = hf_rnn.RecurrentTrainer(model, hf_rnn.RecurrentTrainingArguments(**settings))
    (tmp_path / "corpus.txt").write_text("mine")
    arguments = hf_rnn.RecurrentTrainingArguments(**settings, push_to_hub=True)
    for push in (trainer.push_to_hub, trainer.init_hf_repo, lambda: hf_rnn.RecurrentTrainer(model, arguments)):
        with pytest.raises(ValueError, match="output_dir: .*corpus.txt, which do not belong to a checkpoint"):
            push()
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: pytest.fail("pushed"))
    trainer._push_from_checkpoint(str(tmp_path))
    assert not (tmp_path / "README.md").exists()


def test_weights_and_code_are_those_of_the_folder(pushed, fake_hub):
    folder, _ = pushed
    for name, local, revision in [("model", "first", "main"), ("model", "second", "second"), ("zo", "zo", "main")]:
        files = fake_hub.files(f"me/{name}", revision)
        assert files["model.safetensors"] == (folder / local / "model.safetensors").read_bytes()
        assert b"Made from the sources of hf-rnn" in files["modeling_hf_rnn.py"]
    assert "only after `import hf_rnn`" in fake_hub.files("me/gpt2")["README.md"].decode()
    coded = fake_hub.files("me/coded")
    assert b"from hf_rnn import" in coded["modeling_hf_rnn.py"], "coded weights need the package, as this says"
    assert all(name.endswith(".coded") for name in load(coded["model.safetensors"]))


def test_progress_of_a_run_is_whole_at_every_commit(pushed, fake_hub):
    """What Trainer pushes while it trains loads without the package as well."""
    repository = fake_hub.repositories["me/trained"]
    commits = [
        repository.commits[sha] for sha, m in repository.messages.items() if m.startswith("Training in progress")
    ]
    assert commits
    for files in commits:
        assert {"model.safetensors", "config.json", "modeling_hf_rnn.py", "README.md"} <= set(files)
        assert b"Made from the sources" in files["modeling_hf_rnn.py"]


def test_cards(pushed, fake_hub):
    def card(name, revision="main"):
        return ModelCard(fake_hub.files(f"me/{name}", revision)["README.md"].decode())

    trained, model, zo = card("trained"), card("model"), card("zo")
    assert trained.data.license == "mit" and trained.data.language == "en" and trained.data.datasets == ["me/numbers"]
    assert "cho2014gru" in trained.text and "werbos1990bptt" in trained.text and "feng2024rnns" not in trained.text
    assert "eval_loss" in trained.text and "backpropagation through time" in trained.text
    assert "feng2024rnns" in model.text and 'from_pretrained("me/model")' in model.text
    assert "chaubard2025zero" in zo.text and "gers2000forget" in zo.text and "4 low_rank directions" in zo.text
    assert card("folder", "v1").data.license == "apache-2.0" and "kumar2026smt" in card("folder", "v1").text
    results = fake_hub.files("me/trained")[".eval_results/hf_rnn.yaml"].decode()
    assert yaml_dump([{"dataset": {"id": "me/numbers", "task_id": "text-generation"}}])[:40] in results
    assert fake_hub.cards and fake_hub.requests["validate"] == len(fake_hub.cards)


def test_what_comes_back(pushed):
    """From the Hub, at a branch and at a commit, bit for bit; the replayed run and the card's snippet as well."""
    _, output = pushed
    assert output.count("SAME ") == 8 and "SNIPPET The " in output


@pytest.mark.slow
def test_without_the_package(pushed, fake_hub, bare_python, tmp_path):
    result = bare_python(ALONE, tmp_path, **fake_hub.environment)
    assert result.returncode == 0, result.stderr[-3000:]
    coded, gpt2, unasked = [line for line in result.stdout.splitlines() if "REFUSED" in line]
    assert "hf_rnn. Run `pip install hf_rnn`" in coded
    assert "`pip install hf-rnn`, then `import hf_rnn`" in gpt2, "not random weights with a warning"
    assert "trust_remote_code" in unasked


def test_refusals_are_told_in_a_line(pushed, fake_hub):
    _, output = pushed
    messages = json.loads(output.split("MESSAGES ")[1].splitlines()[0])
    expected = {
        "forbidden": "403",
        "corrupted": "SHA-256",
        "crash": "500",
        "card": "README.md",
        "weights": "model.safetensors",
        "config": "config.json",
    }
    for fault, words in expected.items():
        status, error = messages[fault]
        assert status == 1 and words in error and "Traceback" not in error, (fault, error)
    assert messages["once"][0] == 0, "huggingface_hub tries again"
    assert set(fake_hub.files("me/once")) and "me/bad" not in fake_hub.repositories
    assert not fake_hub.files("me/corrupted") and not fake_hub.files("me/crash")
