"""The house stays as it is: layering, lazy imports, names that shadow nobody."""

import ast
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_rnn

ROOT = Path(__file__).resolve().parents[1]

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {blocked} else find_spec(name, package)
)
"""


def run(code, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_import_is_lazy():
    """Nothing slow beyond what transformers itself imports."""
    result = run(
        "import sys; from transformers import AutoModelForCausalLM, PreTrainedModel; before = set(sys.modules);"
        "import hf_rnn; new = {name.split('.')[0] for name in set(sys.modules) - before}; print(sorted(new))"
    )
    assert result.returncode == 0, result.stderr
    assert not {"triton", "numba", "llvmlite", "datasets", "peft", "matplotlib"} & set(ast.literal_eval(result.stdout))


@pytest.mark.slow
def test_works_without_triton_and_numba():
    """Without either, the same numbers as with numba."""
    code = (
        "import torch, hf_rnn; torch.manual_seed(0);"
        "model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(hidden_size=8, num_hidden_layers=1));"
        "ids = torch.arange(20)[None]; loss = model.train()(ids, labels=ids).loss; loss.backward();"
        "print(loss.item(), model.model.embed_tokens.weight.grad.norm().item(),"
        " model.eval().generate(ids, max_new_tokens=5, do_sample=False)[0].tolist(), 'numba' in sys.modules)"
    )
    plain = run(BLOCK.format(blocked={"numba", "triton", "llvmlite"}) + code)
    compiled = run("import sys\n" + code)
    assert plain.returncode == 0, plain.stderr
    a, b = plain.stdout.split(), compiled.stdout.split()
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-6) and float(a[1]) == pytest.approx(float(b[1]), rel=1e-5)
    assert a[2:-1] == b[2:-1] and (a[-1], b[-1]) == ("False", "True")


def test_kernels_import_neither_transformers_nor_each_other_upwards():
    allowed = {"kernels/hf_rnn_kernels": {"hf_rnn_trainers", "hf_rnn", "transformers", "accelerate", "datasets"}}
    allowed["trainers/hf_rnn_trainers"] = {"hf_rnn"}
    for folder, forbidden in allowed.items():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {name.split(".")[0] for name in names} & forbidden, path


def test_no_folder_shadows_a_library():
    """transformers imports `kernels`; our folder of that name must be no package (see CONTRIBUTING.md)."""
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "trainers/__init__.py").exists()
    result = run(
        "import transformers.integrations.hub_kernels, hf_rnn_kernels, hf_rnn_trainers; import triton; triton.jit"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_wheel_holds_three_packages(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("hf_rnn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 5e6
    for name in hf_rnn.pretrained():
        folder = f"hf_rnn/checkpoints/{name}"
        assert {f"{folder}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")} <= set(names)
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"hf_rnn", "hf_rnn_kernels", "hf_rnn_trainers"}
    assert "hf_rnn_trainers/model_card/template.md" in names and "hf_rnn/py.typed" in names


def test_unknown_gates_and_public_names():
    for name in hf_rnn.__all__:
        assert getattr(hf_rnn, name) is not None
    assert set(dir(hf_rnn)) >= {"MinGRUConfig", "RecurrentTrainer", "min_gru_scan"}


@pytest.mark.parametrize("package", ["hf_rnn", "kernels/hf_rnn_kernels", "trainers/hf_rnn_trainers"])
def test_type_checkers_know_every_public_name(package):
    """What is imported when first used stands in the TYPE_CHECKING block as well."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    statements = [statement for node in (tree, *blocks) for statement in node.body]
    known = {alias.name for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names}
    module = importlib.import_module(Path(package).name)
    assert set(module.__all__) <= known
