"""The commands, as a user runs them, on a text small enough to train on in seconds."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hf_rnn import ARCHITECTURES, GRUConfig, GRUForCausalLM, RecurrentCache, byte_tokenizer
from hf_rnn.cli import generate
from hf_rnn.cli.baselines import lzma_bits_per_byte, ngram_bits_per_byte, repeated_share
from hf_rnn.cli.data import tokenize
from hf_rnn.cli.main import main
from hf_rnn.cli.train import default_learning_rate
from hf_rnn.tasks.evaluation import bits_per_byte, loss_by_position, stream_loss

TEXT = "the cat sat on the mat. the dog sat on the log. " * 120
ON_A_DEVICE = [["generate", "nowhere/checkpoint"], ["eval", "nowhere/checkpoint", "--data", "x"]]
ON_A_DEVICE += [["compress", "nowhere/checkpoint", "nowhere/coded"]]
SMALL = ["--config", "hidden_size=24,num_hidden_layers=1", "--block_size", "64", "--max_steps", "30"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    arguments = ["train", "--data", str(folder / "text.txt"), "--output_dir", str(folder / "out"), "--use_cpu", "True"]
    assert main([*arguments, "--learning_rate", "1e-2", *SMALL]) == 0
    return folder / "out"


def test_train_leaves_a_whole_checkpoint(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "loss.png",
        "modeling_hf_rnn.py",
    }
    assert json.loads((checkpoint / "config.json").read_text())["hidden_size"] == 24
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "bits_per_byte" in card.text
    snippet = card.text.split("```python")[1].split("```")[0].replace('"out"', repr(str(checkpoint)))
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=200)
    assert result.stdout.startswith("The "), result.stderr


def test_a_learning_rate_by_the_width(tmp_path):
    """Where none is told, and saved as if it had been."""
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["train", "--data", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    small = ["--config", "hidden_size=160,num_hidden_layers=1", "--block_size", "32", "--max_steps", "1"]
    assert main([*arguments, *small]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"learning_rate\W+0\.008\b", card)
    widths = [default_learning_rate(GRUConfig(hidden_size=width)) for width in (16, 64, 256)]
    assert widths == [0.02, 0.02, 0.005]


def test_smt_then_dmt(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["train", "--data", str(tmp_path / "text.txt"), "--use_cpu", "--block_size", "32", "--max_steps", "3"]
    small = ["--config", "hidden_size=16,num_memory_tokens=2,updater=mlp", "--output_dir", str(tmp_path / "smt")]
    assert main([*arguments, *small, "--trainer", "smt", "--teacher_encoder_layers", "1"]) == 0
    names = {path.name for path in (tmp_path / "smt").iterdir()}
    assert names >= {"config.json", "model.safetensors", "teacher", "README.md", "loss.png"}
    assert "Supervised Memory Training" in (tmp_path / "smt" / "README.md").read_text()
    assert "hf_rnn_memory" in (tmp_path / "smt" / "config.json").read_text()
    dmt = [*arguments, "--trainer", "dmt", "--output_dir", str(tmp_path / "dmt")]
    assert main([*dmt, "--teacher", str(tmp_path / "smt")]) == 0
    assert main([*dmt, "--teacher", str(tmp_path / "smt" / "teacher")]) == 0
    assert main([*arguments, "--trainer", "smt", "--teacher", str(tmp_path / "smt"), *small[2:]]) == 0
    assert "DAgger Memory Training" in (tmp_path / "dmt" / "README.md").read_text()
    assert main(["generate", str(tmp_path / "dmt"), "--prompt", "the", "--max_new_tokens", "5"]) == 0
    assert "the" in capsys.readouterr().out
    assert main([*dmt, "--teacher", "none", "--readout_steps", "2", *small[:2]]) == 0
    assert "backpropagation truncated to 2 steps" in (tmp_path / "dmt" / "README.md").read_text()
    assert main(dmt) == 1
    assert "teacher: expected the folder that `hf-rnn train --trainer smt` saved" in capsys.readouterr().err
    assert main([*arguments, "--teacher", str(tmp_path / "smt")]) == 1
    assert "teacher: only smt and dmt have one" in capsys.readouterr().err
    assert main([*arguments, "--trainer", "smt", "--model", "mingru", "--output_dir", str(tmp_path / "no")]) == 1
    assert "MinGRU: nothing to gain from training by memories" in capsys.readouterr().err


def test_presets_of_memory_training(tmp_path, capsys):
    """Options given beside a preset count; DMT takes the optimizer of the checkpoint over."""
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["train", "--data", str(tmp_path / "text.txt"), "--use_cpu", "--block_size", "32", "--max_steps", "2"]
    smt, dmt = str(tmp_path / "smt"), str(tmp_path / "dmt")
    model = ["--config", "hidden_size=16,num_memory_tokens=2,updater=mlp", "--teacher_encoder_layers", "1"]
    dense = ["--preset", "dense", "--student_steps", "3", "--save_steps", "2"]
    assert main([*common, *model, "--trainer", "smt", *dense, "--output_dir", smt]) == 0
    settings = torch.load(tmp_path / "smt" / "training_args.bin", weights_only=False)
    assert (settings.student_steps, settings.coef_first, settings.all_positions) == (3, 1.0, True)
    assert '"decoder_layers": 0' in (tmp_path / "smt" / "teacher" / "config.json").read_text()
    more = ["--trainer", "dmt", "--teacher", smt, "--preset", "dense", "--optimizer_from", f"{smt}/checkpoint-2"]
    assert main([*common, *more, "--output_dir", dmt]) == 0
    assert main([*common, *model[:2], "--trainer", "smt", "--preset", "sparse", "--output_dir", dmt]) == 1
    assert "preset: expected one of dense, rare, paper, got 'sparse'" in capsys.readouterr().err
    assert main([*common, "--preset", "dense", "--output_dir", dmt]) == 1
    assert "preset: only smt and dmt have some" in capsys.readouterr().err


def test_zero_order(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["train", "--data", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    few = ["--config", "hidden_size=8,num_hidden_layers=1", "--block_size", "32", "--max_steps", "3"]
    assert main([*arguments, *few, "--trainer", "zo", "--num_directions", "6", "--epsilon", "0.03"]) == 0
    assert len((tmp_path / "out" / "zo_replay.jsonl").read_text().splitlines()) == 1 + 3
    assert "zero-order estimates (cd, 6 low_rank directions, epsilon 0.03" in (tmp_path / "out/README.md").read_text()
    assert main([*arguments, "--trainer", "x"]) == 1
    assert (
        "trainer: expected one of ['backpropagation', 'zo', 'smt', 'dmt', 'rate'], got 'x'" in capsys.readouterr().err
    )
    assert main([*arguments, "--trainer", "zo", "--epsilon", "-1"]) == 1
    assert "epsilon: expected a number above 0" in capsys.readouterr().err


def test_generate_goes_on_from_a_state(checkpoint, tmp_path, capsys):
    """Runs that pass a state on give what one run on the whole text gives; each text is read once."""
    file, printed = str(tmp_path / "chat.state"), []
    for prompt, count in (("the cat", "13"), (" on the mat", "9"), ("", "7")):
        options = ["--prompt", prompt, "--max_new_tokens", count, "--temperature", "0"]
        assert main(["generate", str(checkpoint), *options, "--state", file]) == 0
        printed.append(capsys.readouterr().out.removesuffix("\n"))
    text, model = "".join(printed), AutoModelForCausalLM.from_pretrained(checkpoint)
    assert len(text) == 7 + 13 + 11 + 9 + 7 and text.startswith("the cat")
    whole = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    for end, count in ((20, 13), (40, 9), (47, 7)):
        new = model.generate(whole[:, : end - count], max_new_tokens=count, do_sample=False)
        assert torch.equal(new, whole[:, :end])
    state = RecurrentCache.load(file, model)
    assert state.seen_tokens == whole.shape[1] - 1 and torch.equal(state.beside["tokens"], whole[:, -1:])
    GRUForCausalLM(GRUConfig(hidden_size=8)).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    assert main(["generate", str(tmp_path / "other"), "--state", file]) == 1
    assert "chat.state: the state of another model" in capsys.readouterr().err
    model(whole, use_cache=True).cache.save(file)
    assert main(["generate", str(checkpoint), "--state", file]) == 1
    assert "chat.state: expected the state of one text" in capsys.readouterr().err


def test_a_long_text_is_read_in_pieces(checkpoint, tmp_path, capsys, monkeypatch):
    """From a file, without printing it; as it would be read at once."""
    monkeypatch.setattr(generate, "PIECE", 5)
    text, file = tmp_path / "text.txt", tmp_path / "chat.state"
    text.write_text("the cat sat on the mat")
    options = ["--max_new_tokens", "9", "--temperature", "0"]
    assert main(["generate", str(checkpoint), "--prompt", text.read_text(), *options]) == 0
    whole = capsys.readouterr().out
    for state in ([], ["--state", str(file)]):
        assert main(["generate", str(checkpoint), "--prompt_file", str(text), *options, *state]) == 0
        assert "the cat sat on the mat" + capsys.readouterr().out == whole
    assert RecurrentCache.load(file).seen_tokens == 22 + 9 - 1
    text.write_bytes(b"\xff")
    for arguments, message in (
        (["--prompt_file", str(text)], "prompt_file: .*text.txt: expected UTF-8"),
        (["--prompt_file", str(text), "--prompt", "x"], "prompt, prompt_file: expected one of them"),
        (["--state", str(tmp_path)], "state: expected a file in a folder that is there"),
        (["--state", str(tmp_path / "nowhere" / "a")], "state: expected a file in a folder that is there"),
    ):
        assert main(["generate", str(checkpoint), *arguments]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_eval_and_generate(checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["eval", str(checkpoint), "--data", str(tmp_path / "text.txt")]) == 0
    bits = float(capsys.readouterr().out.split("bits per byte:")[1].split()[0])
    assert 0 < bits < 3.5
    assert main(["generate", str(checkpoint), "--prompt", "the cat", "--max_new_tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["generate", str(checkpoint), "--max_new_tokens", "5", "--temperature", "0", "--device", "cpu"]) == 0


def test_going_on_from_a_checkpoint_with_a_dataset(checkpoint, tmp_path, capsys):
    DatasetDict(train=Dataset.from_dict({"body": [TEXT[:2000], TEXT[2000:4000]]})).save_to_disk(tmp_path / "data")
    arguments = ["train", "--model", str(checkpoint), "--data", str(tmp_path / "data"), "--text_column", "body"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--block_size", "64", "--use_cpu", "True"]
    assert main(arguments) == 0
    assert "held-out bits per byte" in capsys.readouterr().out
    assert main([*arguments, "--text_column", "text"]) == 1
    assert "text_column" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "nowhere/checkpoint", "--data", "x"], "hf-rnn eval: "),
        (["train", "--data", "EMPTY"], "holds no text"),
        (["train", "--data", "SHORT"], "do not fill one block"),
        (["train", "--data", "SHORT", "--config", "hiden_size=3"], "setting of a mingru, got 'hiden_size"),
        (["train", "--data", "SHORT", "--config", "hidden_size"], "expected name=value"),
        (
            ["train", "--data", "SHORT", "--model", "mingpt"],
            f"expected one of {list(ARCHITECTURES.values())}",
        ),
        (["train", "--data", "SHORT", "--block_size", "0"], "block_size: expected at least 2"),
        (["train", "--data", "SHORT", "--held_out", "1.0"], "held_out: expected a share"),
        (["train", "--data", "/nowhere/text.txt"], "there is no file /nowhere/text.txt"),
        (["train", "--data", "BINARY"], "is not UTF-8 text"),
        (["frobnicate"], "unknown command"),
        *[([*command, "--device", "cuda:99"], "device: expected one of ['cpu'") for command in ON_A_DEVICE],
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, tmp_path, capsys):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("short")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    arguments = [str(tmp_path / a) if a in ("EMPTY", "SHORT", "BINARY") else a for a in arguments]
    if arguments[0] == "train":
        arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    assert main(arguments) != 0
    assert message in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "README.md").write_text("mine")
    assert main(["train", "--data", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path)]) == 1
    assert "holds files and no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_special_tokens_in_a_text_are_text():
    stream, ends = tokenize(["a<|eos|>b"], byte_tokenizer())
    assert stream.tolist() == list(b"a<|eos|>b") and ends.tolist() == list(range(1, 10))


def byte_pairs(*texts):
    """A byte-level tokenizer with merges, as GPT-2's, that has read these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def known_words(**words):
    """A tokenizer of whole words, for which all others are <unk>."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_are_those_of_the_text_that_was_read():
    """Whatever the tokenizer drops, replaces or splits: characters of several bytes, unknown words, spaces."""
    texts = ["é", "the 循环 cat 😀 zz ", "", "ab ø"]
    whole = [len(text.encode()) for text in texts]
    for tokenizer in (byte_tokenizer(), ByT5Tokenizer()):  # with offsets, and without
        for text in texts:
            assert tokenize([text], tokenizer)[1].tolist() == list(range(1, len(text.encode()) + 1))
        ids, ends = tokenize(texts, tokenizer)
        assert ends[ids == tokenizer.eos_token_id].tolist() == np.cumsum(whole).tolist()
    ids, ends = tokenize([texts[1]], byte_pairs("the 循环 cat" * 3))
    pieces = byte_pairs("the 循环 cat" * 3).convert_ids_to_tokens(ids.tolist())
    assert ends.tolist() == np.cumsum([len(piece) for piece in pieces]).tolist()  # a character of theirs is a byte
    assert len(ids) < ends[-1]
    assert tokenize([texts[1]], known_words(the=1, cat=2))[1].tolist() == [3, 10, 14, 19, 23]


@pytest.mark.parametrize("text", ["é", "循环神经网络"])
def test_eval_counts_bytes_of_the_text(text, tmp_path, capsys):
    """The first token may end inside a character, and need not decode to anything."""
    torch.manual_seed(0)
    model = GRUForCausalLM(GRUConfig(hidden_size=16, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text)
    assert main(["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]) == 0
    ids = torch.tensor(list(text.encode()))
    bits = stream_loss(model.eval(), ids) / math.log(2) / (len(ids) - 1)
    assert f"{bits:.3f} over {len(ids) - 1} bytes" in capsys.readouterr().out


def test_a_text_without_bytes_after_the_first_token(tmp_path):
    model = GRUForCausalLM(GRUConfig(hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="num_bytes: expected at least 1"):
        bits_per_byte(model, torch.tensor([97, 258]), 0)


def test_train_counts_held_out_bytes_of_the_text(tmp_path, capsys):
    """With a tokenizer for which every other word is unknown."""
    known_words(the=1, cat=2, eos=3).save_pretrained(tmp_path / "words")
    text = "the cat 循环 zz " * 40
    (tmp_path / "text.txt").write_text(text)
    folder = tmp_path / "out"
    arguments = ["train", "--tokenizer", str(tmp_path / "words"), "--data", str(tmp_path / "text.txt"), "--use_cpu"]
    arguments += ["--output_dir", str(folder), "--block_size", "16", "--max_steps", "1", *SMALL[:2]]
    assert main(arguments) == 0
    told = float(capsys.readouterr().out.split("held-out bits per byte: ")[1].split()[0])
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[-8:]
    assert model.config.vocab_size == 4 and model.config.eos_token_id is None
    read = len(" cat 循环 zz the cat 循环 zz ".encode())
    assert told == pytest.approx(stream_loss(model, ids) / math.log(2) / read, abs=1e-3)


def test_help(capsys):
    assert main([]) == 0
    assert "hf-rnn train" in capsys.readouterr().out


def test_streamed_evaluation_is_the_whole_texts_loss(checkpoint):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor(tokenizer(TEXT[:700])["input_ids"])
    whole = model(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)
    for chunk in (1, 7, 100, 10_000):
        assert stream_loss(model, ids[: 120 if chunk == 1 else None], chunk=chunk) == pytest.approx(
            whole if chunk > 1 else stream_loss(model, ids[:120]), rel=1e-5
        )
    assert bits_per_byte(model, ids, 699) == pytest.approx(whole / 699 / 0.693147, rel=1e-5)


def test_ngram_baselines():
    assert ngram_bits_per_byte(b"ab" * 500, b"ab" * 50, 2)[0] == pytest.approx(1.0, abs=0.02)
    assert ngram_bits_per_byte(b"ab" * 500, b"ab" * 50, 2)[1] < 0.05
    train, held_out = b"to be or not to be ", b"to be not to be"
    orders = []
    for order in range(3):  # the definition, slowly
        total = 0.0
        for i in range(len(held_out)):
            p = 1 / 256
            for k in range(order + 1):
                context = (train + held_out)[len(train) + i - k : len(train) + i]
                followers = [train[j + k] for j in range(len(train) - k) if train[j : j + k] == context]
                if followers:
                    distinct = len(set(followers))
                    p = (followers.count(held_out[i]) + distinct * p) / (len(followers) + distinct)
            total -= __import__("math").log2(p)
        orders.append(total / len(held_out))
    assert ngram_bits_per_byte(train, held_out, 2) == pytest.approx(orders)
    assert lzma_bits_per_byte(b"abcdefgh" * 100, b"abcdefgh" * 100) < 1
    assert repeated_share(b"..abcdef..", b"-abcdef--bcde", 4) == pytest.approx(10 / 13)
    assert repeated_share(b"abc", b"abcabc", 4) == 0


def test_streams(tmp_path, capsys):
    """Documents in streams; loss over the distance from the start, printed and drawn."""
    data = Dataset.from_dict({"text": [TEXT[i : i + 300] for i in range(0, 3000, 300)]})
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "data")
    arguments = ["train", "--model", "mingru", "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    arguments += [
        "--config",
        "hidden_size=16,num_hidden_layers=1",
        "--use_cpu",
        "--max_steps",
        "6",
        "--held_out",
        "0.1",
    ]
    arguments += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2", "--stream"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "3", "--backprop", "truncated"]
    assert main([*arguments, "--block_size", "700", "--stream_length", "32", "--chunk_size", "33"]) == 1
    assert "chunk_size: expected at most stream_length=32 tokens, got 33" in capsys.readouterr().err
    assert main([*arguments, "--block_size", "32", "--chunk_size", "10"]) == 0
    assert "held-out bits per byte" in capsys.readouterr().out
    assert "as 4 streams of 32 tokens" in (tmp_path / "out/README.md").read_text()
    picture = tmp_path / "positions.png"
    arguments = ["eval", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--rows", "4", "--trained", "32"]
    assert main([*arguments, "--positions", str(picture)]) == 0
    assert "nats per token from token 512 on" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (["--positions", "no/x.png"], "positions: expected a .png"),
        ([], "rows, trained: only with"),
    ):
        assert main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_loss_by_position(checkpoint):
    """Each range's mean over the whole parts' losses, in pieces of any size."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(TEXT[:611])["input_ids"])
    parts = ids[:609].view(3, 203)
    nats = torch.nn.functional.cross_entropy(
        model(parts).logits[:, :-1].flatten(0, 1), parts[:, 1:].flatten(), reduction="none"
    ).view(3, 202)
    for chunk in (7, 1000):
        found = loss_by_position(model, ids, rows=3, chunk=chunk)
        assert list(found) == [1, 2, 4, 8, 16, 32, 64, 128]
        for first, loss in found.items():
            assert loss == pytest.approx(nats[:, first - 1 : 2 * first - 1].mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="ids: expected one sequence of at least 2 tokens for each of 16 rows, got 20"):
        loss_by_position(model, ids[:20])


def test_export(checkpoint, tmp_path, capsys, monkeypatch):
    """A file that is checked against torch, and an error where it is another's."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from hf_rnn.cli import export

    monkeypatch.setattr(export, "SHAPES", [(1, 1), (2, 9)])
    assert main(["export", str(checkpoint), str(tmp_path / "x.onnx"), "--padding"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["batch", "length", "error", "torch", "ms", "onnx", "ms"]
    assert [line.split()[:2] for line in printed[1:3]] == [["1", "1"], ["2", "9"]]
    assert "x.onnx, the same to" in printed[3] and (tmp_path / "x.onnx").stat().st_size > 1000
    whole = export.StatefulModel(AutoModelForCausalLM.from_pretrained(checkpoint), padding=True)
    session = export.Session(tmp_path / "x.onnx")
    next(whole.parameters()).data.add_(0.1)
    assert export.compare(whole, session) > export.TOLERANCE
    monkeypatch.setattr(export, "compare", lambda *_: float("nan"))
    assert main(["export", str(checkpoint), str(tmp_path / "y.onnx")]) == 1
    assert "file: expected torch's outputs to 1e-04" in capsys.readouterr().err
