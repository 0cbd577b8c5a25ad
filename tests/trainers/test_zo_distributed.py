"""Processes that share directions end with the same bits, however many they are; those that share data agree."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hf_rnn_trainers.zo.replay_log import read

pytestmark = pytest.mark.slow
SCRIPT = """
import hashlib, os, sys
sys.path[:0] = [os.environ["TESTS"]]
import torch
from hf_rnn import LSTMConfig, LSTMForCausalLM
from zo_runs import make_data, make_trainer

folder, world = sys.argv[1], int(os.environ["WORLD_SIZE"])
rank = os.environ["RANK"]

def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()

def model():
    torch.manual_seed(int(rank))  # process 0 has the weights that count
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return LSTMForCausalLM(LSTMConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, **tokens))

settings = dict(max_steps=4, num_directions=13, directions_per_forward=2, ddp_backend="gloo")
shared = make_trainer(f"{folder}/directions", model(), **settings)
shared.train()
lines = [f"DIRECTIONS {digest(shared.model)}"]
streamed = make_trainer(f"{folder}/streamed", model(), data=make_data().to_iterable_dataset(), **settings)
streamed.train()
lines.append(f"STREAMED {digest(streamed.model)}")
split = make_trainer(
    f"{folder}/data", model(), per_device_train_batch_size=6 // world, data_shards=world, learning_rate=0.01, **settings
)
split.train()
lines.append(f"DATA {digest(split.model)}")
assert type(split.model_wrapped) is LSTMForCausalLM  # no wrapper with buckets for gradients
assert shared.forward_passes < 4 * 26 * (1.5 / world if world > 1 else 1.01)
with open(f"{folder}/process-{rank}.txt", "w") as file:  # standard output is shared, and has the trainers' logs
    file.write("\\n".join(lines))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads do not survive the interpreter's end
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digests of the weights of every process, and the folder, for 1 and 3 processes of one thread each."""
    folder = tmp_path_factory.mktemp("zo")
    (folder / "train.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TESTS": os.path.dirname(os.path.dirname(__file__))}
    found = {}
    for world in (1, 3):
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone", str(folder / "train.py")]
        command = [sys.executable, *launch, str(folder / str(world))]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
        files = sorted((folder / str(world)).glob("process-*.txt"))
        found[world] = [line.split() for file in files for line in file.read_text().splitlines()]
    return folder, found


@pytest.mark.parametrize("kind", ["DIRECTIONS", "STREAMED"])
def test_shared_directions_give_the_same_bits(kind, runs):
    _, found = runs
    digests = [digest for lines in found.values() for k, digest in lines if k == kind]
    assert len(digests) == 1 + 3
    assert len(set(digests)) == 1


def test_shared_data_give_the_same_scalars(runs):
    folder, found = runs
    for world, lines in found.items():
        assert len({digest for kind, digest in lines if kind == "DATA"}) == 1, world  # equal on all its processes
        c, expected = (
            [step.coefficients for step in read(folder / str(w) / "data" / "zo_replay.jsonl")[1]] for w in (world, 1)
        )
        assert len(c) == 4
        torch.testing.assert_close(torch.stack(c), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_one_log_for_all(runs):
    folder, _ = runs
    lines = (folder / "3" / "directions" / "zo_replay.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [0, 1, 2, 3]
