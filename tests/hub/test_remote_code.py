"""A checkpoint without `import hf_rnn`: with the package, and where it is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
assert "hf_rnn" not in sys.modules
folder = {folder!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
print(model(torch.arange(9)[None]).logits.double().sum().item())
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == type(model.config).__name__
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(folder + "/again")
"""


def run(code, tmp_path, *options):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    "architecture", ["gru", *[pytest.param(n, marks=pytest.mark.slow) for n in ("memoryrnn", "xlstm")]], indirect=True
)
def test_with_the_package(model, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    result = run(LOAD.format(folder=str(folder)), tmp_path)
    assert result.returncode == 0, result.stderr
    name, total = result.stdout.strip().splitlines()
    assert name == f"{type(model).__module__} {type(model).__name__}"
    assert float(total) == pytest.approx(model(torch.arange(9)[None]).logits.double().sum().item(), abs=1e-4)
    files = {path.name for path in (folder / "again").iterdir()}
    assert files == {path.name for path in folder.iterdir() if path.is_file()}, "a second save adds or loses nothing"


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_without_the_package(model, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    hide = "import sys\nfor name in ('hf_rnn', 'hf_rnn_kernels', 'hf_rnn_trainers'): sys.modules[name] = None\n"
    code = hide + LOAD.replace('assert "hf_rnn" not in sys.modules', "").format(folder=str(folder))
    block = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0].startswith('hf_rnn'): raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    result = run(block + code.removeprefix(hide), tmp_path)
    assert result.returncode != 0
    assert "hf_rnn. Run `pip install hf_rnn`" in result.stderr


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_not_without_asking(model, tmp_path):
    """Nobody's code runs unless trust_remote_code says so; with the package imported nothing needs to."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    refused = run(
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        tmp_path,
    )
    assert refused.returncode != 0 and "trust_remote_code" in refused.stderr
    local = run(
        f"import hf_rnn; from transformers import AutoModelForCausalLM;"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__module__)",
        tmp_path,
    )
    assert local.stdout.strip() == type(model).__module__, local.stderr
