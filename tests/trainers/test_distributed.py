"""Every trainer on several processes: the run of one process, also when their number changes on the way.

Losses are compared to 1e-5, relative: sums of float32 over processes come in another order, which moves the last two
of 24 bits (6e-8) by what a few hundred terms make of it. Weights are compared to 1e-4 of a learning rate a step: where
Adam divides a gradient by its own size, the last bits of small ones count in full. ZOTrainer whose processes share
directions promises every bit.
"""

import json
from pathlib import Path

import pytest
import torch
from launch import TESTS, launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_rnn
from hf_rnn_trainers.base.sharding import check_fsdp, refuse_sharding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # minutes on a busy machine
KINDS = ["backpropagation", "chunked", "stream", "zo", "zo-data", "smt", "dmt", "rate"]
LOSS, WEIGHT = dict(rtol=1e-5, atol=1e-5), dict(rtol=0, atol=6 * 1e-2 * 1e-3)


def work(processes: int, folder: Path, *jobs: str) -> None:
    launch(processes, TESTS / "workers" / "training.py", folder, *jobs)


def losses(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor(json.loads((folder / f"{name}.json").read_text()))


def assert_same(folder: Path, kind: str, name: str, reference: str) -> None:
    """Losses of every step, and weights at the end."""
    found, expected = (load_file(folder / f"{n}.safetensors") for n in (name, reference))
    assert len(losses(folder, name)) == 6 and found.keys() == expected.keys()
    if kind == "zo":
        assert torch.equal(losses(folder, name), losses(folder, reference))
        assert all(torch.equal(found[key], p) for key, p in expected.items())
        return
    torch.testing.assert_close(losses(folder, name), losses(folder, reference), **LOSS)
    for key, p in expected.items():
        torch.testing.assert_close(found[key], p, **WEIGHT, msg=lambda text, key=key: f"{name}, {key}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Whole runs of 1 and 2 processes, and runs whose steps 1-2, 3-4 and 5-6 were made by 1, 2 and 1; of 2 sharded
    ones, three parts as well."""
    folder = tmp_path_factory.mktemp("distributed")
    work(1, folder, *(f"{part}:{kind}" for kind in KINDS for part in ("straight", "first")))
    sharded = ["straight:fsdp", "straight:fsdp-rate", "first:fsdp", "second:fsdp", "third:fsdp"]
    work(2, folder, *(f"{part}:{kind}" for kind in KINDS for part in ("straight", "second")), *sharded)
    work(1, folder, *(f"third:{kind}" for kind in KINDS))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind, folder):
    assert_same(folder, kind, f"{kind}-straight-2-0", f"{kind}-straight-1-0")
    first, second = (load_file(folder / f"{kind}-straight-2-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(second[name], p) for name, p in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_one_then_two_then_one(kind, folder):
    assert_same(folder, kind, f"{kind}-third-1-0", f"{kind}-straight-1-0")


@pytest.mark.parametrize("kind, same", [("fsdp", "backpropagation"), ("fsdp-rate", "rate")])
def test_sharded(kind, same, folder):
    """FSDP 2: the run of one process; the saved checkpoint is whole and loads anywhere."""
    assert_same(folder, kind, f"{kind}-straight-2-0", f"{same}-straight-1-0")
    saved = AutoModelForCausalLM.from_pretrained(folder / kind / "saved")
    expected = load_file(folder / f"{kind}-straight-2-0.safetensors")
    assert all(torch.equal(p, expected[name]) for name, p in saved.named_parameters())


def test_sharded_resumes(folder):
    assert_same(folder, "fsdp", "fsdp-third-2-0", "fsdp-straight-2-0")


@pytest.mark.parametrize("kind", KINDS)
def test_four_processes(kind, folder):
    work(4, folder, f"straight:{kind}")
    assert_same(folder, kind, f"{kind}-straight-4-0", f"{kind}-straight-1-0")


def test_other_models_sharded(tmp_path):
    """Tied embeddings, and a model whose blocks are of another kind."""
    work(1, tmp_path, "straight:tied", "straight:xlstm")
    work(2, tmp_path, "straight:fsdp-tied", "straight:fsdp-xlstm")
    for kind in ("tied", "xlstm"):
        assert_same(tmp_path, kind, f"fsdp-{kind}-straight-2-0", f"{kind}-straight-1-0")


class Wrapped:
    """What a trainer knows of sharding."""

    def __init__(self, fsdp_version: int | None = None, deepspeed: bool = False, asked: bool = False):
        self.is_fsdp_enabled, self.is_deepspeed_enabled = fsdp_version is not None, deepspeed
        self.args = type("args", (), dict(fsdp=asked))
        plugin = type("plugin", (), dict(fsdp_version=fsdp_version))
        self.accelerator = type("accelerator", (), dict(state=type("state", (), dict(fsdp_plugin=plugin))))


@pytest.mark.parametrize("trainer", [Wrapped(fsdp_version=2), Wrapped(deepspeed=True)])
def test_refusals_of_what_needs_whole_weights(trainer):
    """Also when `accelerate launch` asked for it, of which the arguments do not know."""
    with pytest.raises(ValueError, match="DeepSpeed, FSDP: because; use plain processes"):
        refuse_sharding(trainer, "because")
    refuse_sharding(Wrapped(), "because")


def test_refusals_of_what_shards():
    with pytest.raises(ValueError, match="version 1"):
        check_fsdp(Wrapped(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp: accelerate shards over GPUs only"):
        check_fsdp(Wrapped(asked=True))
    check_fsdp(Wrapped(fsdp_version=2, asked=True))
    check_fsdp(Wrapped())


@pytest.mark.parametrize("name", ["ZO", "SMT", "DMT"])
def test_arguments_refused(name, tmp_path):
    with pytest.raises(ValueError, match="deepspeed, fsdp"):
        getattr(hf_rnn, f"{name}Config")(output_dir=str(tmp_path), report_to="none", fsdp=True)
