"""Nothing that a checkpoint brings along is run."""

import ast
import contextlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_rnn
from hf_rnn.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("hf_rnn", "kernels", "trainers") for path in sorted((ROOT / folder).rglob("*.py"))]
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "joblib.load", "torch.hub.load"}
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "subprocess", "marshal", "shelve", "runpy", "code"}
# Reads back machine code that the user's own processes compiled, as numba's own cache does; nothing of a checkpoint's
COMPILED = "kernels/hf_rnn_kernels/cpu_cache.py"


def _calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    """No code from text, no pickles but by torch.load with weights_only, no remote code by default."""
    tree = ast.parse(path.read_text())
    for name, keywords in _calls(tree):
        assert name not in NEVER, name
        assert not name.endswith(("torch.load", "np.load")) or keywords.get("weights_only") == "True", name
        assert keywords.get("trust_remote_code", "False") == "False" and "allow_pickle" not in keywords, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            allowed = {"pickle"} if path == ROOT / COMPILED else set()
            assert not NEVER_IMPORTED - allowed & {module.split(".")[0] for module in modules}, modules


def test_the_scan_sees_what_it_looks_for():
    tree = ast.parse("import torch\ntorch.load('x')\nAutoModel.from_pretrained('x', trust_remote_code=True)")
    assert list(_calls(tree)) == [("torch.load", {}), ("AutoModel.from_pretrained", {"trust_remote_code": "True"})]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """The folder that must never come to be, and a function that writes a pickle that would make it: torch's
    own format, and the bare one of old."""
    folder = tmp_path / "it was run"

    def write(path: Path, bare: bool = False) -> None:
        path.write_bytes(pickle.dumps(Payload(folder))) if bare else torch.save({"x": Payload(folder)}, path)

    write(tmp_path / "probe")
    torch.load(tmp_path / "probe", weights_only=False)
    assert folder.is_dir(), "the payload works"
    folder.rmdir()
    return folder, write


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "adapter_model.bin"])
def test_weights(trap, tmp_path, name, bare):
    """Of a model and of a teacher."""
    folder, write = trap
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1))
    teacher = hf_rnn.SMTTeacher(hf_rnn.SMTTeacherConfig(hidden_size=8, num_heads=1, encoder_layers=1, decoder_layers=1))
    for i, saved in enumerate((model, teacher)):
        saved.save_pretrained(tmp_path / str(i))
        (tmp_path / str(i) / "model.safetensors").unlink()
        write(tmp_path / str(i) / name, bare)
    with pytest.raises(Exception, match=r".+"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    with pytest.raises(Exception, match=r".+"):
        hf_rnn.SMTTeacher.from_pretrained(tmp_path / "1")
    assert not folder.exists()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights.bin", "weights"])
def test_convert(trap, tmp_path, name, bare, capsys):
    folder, write = trap
    write(tmp_path / name, bare)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "target")]) == 1
    assert "source" in capsys.readouterr().err
    assert not folder.exists()


def test_tokenizer_and_settings(trap, tmp_path):
    """Files of other kinds are not read as pickles, whatever they hold."""
    folder, write = trap
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    hf_rnn.byte_tokenizer().save_pretrained(tmp_path / "model")
    for path in sorted((tmp_path / "model").iterdir()):
        kept = path.read_bytes()
        write(path)
        with contextlib.suppress(Exception):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with contextlib.suppress(Exception):
            AutoTokenizer.from_pretrained(tmp_path / "model")
        with contextlib.suppress(Exception):
            hf_rnn.ZOTrainer.replay(tmp_path / "model", path)
        path.write_bytes(kept)
    assert not folder.exists()


IDS = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()
COMMON = dict(max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)


def recurrent(folder):
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1))
    return hf_rnn.RecurrentTrainer, model, TrainingArguments(str(folder), disable_tqdm=True, **COMMON)


def zero_order(folder):
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1))
    return hf_rnn.ZOTrainer, model, hf_rnn.ZOConfig(str(folder), num_directions=2, disable_tqdm=True, **COMMON)


def by_memories(folder):
    model = hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(hidden_size=8, updater="mlp", num_memory_tokens=2))
    small = dict(teacher_heads=1, teacher_encoder_layers=1, teacher_decoder_layers=1)
    return hf_rnn.SMTTrainer, model, hf_rnn.SMTConfig(str(folder), disable_tqdm=True, **small, **COMMON)


@pytest.mark.parametrize("setup", [recurrent, zero_order, by_memories])
def test_resume(trap, tmp_path, setup):
    """Every file of a checkpoint in turn is the payload: resuming refuses it, or goes on without."""
    marker, write = trap
    data = Dataset.from_dict({"input_ids": IDS, "labels": IDS})

    def trainer():
        kind, model, arguments = setup(tmp_path / "run")
        return kind(model, arguments, train_dataset=data)

    trainer().train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    files = [path.relative_to(checkpoint) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= {path.name for path in files}
    for name in files:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        write(checkpoint / name)
        with contextlib.suppress(Exception):
            trainer().train(resume_from_checkpoint=str(checkpoint))
        assert not marker.exists(), name
