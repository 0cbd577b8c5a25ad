"""Models that come with the package, and `hf-rnn eval --dynamic`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_rnn
from hf_rnn.checkpoints import DEFAULT, find_checkpoint
from hf_rnn.cli.main import main
from hf_rnn.tasks import python_documentation
from hf_rnn.tasks.dynamic_evaluation import dynamic_loss
from hf_rnn.tasks.evaluation import stream_loss

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/checkpoints_cpu.json"
KINDS = {"documentation", "sources", "test"}


@pytest.mark.parametrize("name", hf_rnn.pretrained())
def test_a_model_that_comes_with_the_package(name):
    """Small, and its card says what was measured, of which text, under which terms, and by which command."""
    folder = Path(hf_rnn.pretrained(name))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1e6
    card, row = ModelCard.load(folder / "README.md"), json.loads(RESULTS.read_text())["results"][name]
    assert card.data.license == "apache-2.0" and f'from_pretrained(hf_rnn.pretrained("{name}"))' in card.text
    told = (row["about"], row["command"], f"{row['seconds']:.0f} seconds", "The text is ")
    assert [words for words in told if words not in card.text] == []
    rows = [f"| held-out {kind} | {row[f'{kind}, before coding']:.5g} | {row[kind]:.5g} |" for kind in KINDS & set(row)]
    assert rows and [line for line in rows if line not in card.text] == []


def test_the_default_knows_the_documentation():
    """Held-out, in fewer bits than order-5 counting on what it learned from takes: 1.59."""
    model = AutoModelForCausalLM.from_pretrained(hf_rnn.pretrained(DEFAULT))
    ids = torch.tensor(list(python_documentation()[1].encode()))[:8193]
    assert stream_loss(model, ids) / (len(ids) - 1) / torch.log(torch.tensor(2.0)) < 1.5


def test_generate_without_a_checkpoint(capsys):
    command = ["generate", "--prompt", "def ", "--max_new_tokens", "40", "--temperature", "0"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ") and len(first) > 40
    assert main(["generate", DEFAULT, *command[1:]]) == 0
    assert capsys.readouterr().out == first


def test_names(tmp_path, monkeypatch):
    assert DEFAULT in hf_rnn.pretrained()
    with pytest.raises(ValueError, match=rf"name: expected one of \[.*'{DEFAULT}'.*\], got 'mingpt'"):
        hf_rnn.pretrained("mingpt")
    assert find_checkpoint(DEFAULT) == hf_rnn.pretrained(DEFAULT)
    assert find_checkpoint("someone/mingru") == "someone/mingru"
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT).mkdir()
    assert find_checkpoint(DEFAULT) == DEFAULT  # a folder of this name comes first


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1))


def test_what_is_random_stays_so(small):
    """Each token is scored before the weights have seen it: of random tokens nothing is learned, at any rate, where
    weights that had seen them would know them by heart."""
    ids = torch.randint(0, 16, (401,), generator=torch.Generator().manual_seed(1))
    before = {name: p.clone() for name, p in small.state_dict().items()}
    still = stream_loss(small, ids)
    assert dynamic_loss(small, ids, learning_rate=0.0, segment=7) == pytest.approx(still, rel=1e-5)
    assert dynamic_loss(small, ids, learning_rate=0.02, segment=8) > 400 * torch.log(torch.tensor(16.0)) * 0.98
    assert all(torch.equal(p, before[name]) for name, p in small.state_dict().items())


def test_segments_are_scored_with_the_weights_before_them(small):
    """Beside a loop written out, the state going on; and what comes later changes no score."""
    ids = torch.arange(61) % 5
    model = hf_rnn.MinGRUForCausalLM(small.config)
    model.load_state_dict(small.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
    expected, state = [], None
    for start in range(0, 60, 20):
        outputs = model(ids[None, start : start + 20], past_key_values=state, use_cache=True)
        losses = torch.nn.functional.cross_entropy(outputs.logits[0], ids[start + 1 : start + 21], reduction="none")
        expected.append(losses.sum().item())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        state = outputs.past_key_values.detach()
    for count in (1, 2, 3):
        found = dynamic_loss(small, ids[: 20 * count + 1], learning_rate=0.01, segment=20)
        assert found == pytest.approx(sum(expected[:count]), rel=1e-4)
    assert expected[2] < 0.7 * expected[0]


def test_eval_dynamic(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and that was that. " * 12)
    command = ["eval", DEFAULT, "--data", str(tmp_path / "text.txt")]
    assert main([*command, "--dynamic", "--segment", "64"]) == 0
    out = capsys.readouterr().out
    still, learning = (float(out.split(words)[1].split()[0]) for words in ("bits per byte: ", "dynamic evaluation: "))
    assert 0 < learning < still
    assert main([*command, "--segment", "64"]) == 1
    assert "learning_rate, segment: only with --dynamic" in capsys.readouterr().err
    assert main([*command, "--dynamic", "--segment", "0"]) == 1
    assert "segment: expected at least 1 token, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo(tmp_path):
    """A few steps of it; the benchmark reads every line of its table."""
    command = [sys.executable, "-m", "hf_rnn.cli.demo", "--steps", "3", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    pattern = re.search(r'^ROW = r"(.+)"$', (ROOT / "benchmarks/demo.py").read_text(), re.MULTILINE)[1]
    bits = dict(re.findall(pattern, result.stdout, re.MULTILINE))
    assert list(bits) == [f"byte n-gram, order {n}" for n in range(6)] + [
        "this minGRU",
        "and learning on the way",
        "lzma",
    ]
    assert float(bits["and learning on the way"]) < float(bits["this minGRU"])
