"""Two processes train both networks: they end with the same weights, those of one process with the same batch."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import os, sys
sys.path[:0] = [os.environ["TESTS"]]
import torch
from safetensors.torch import save_file
from test_smt_trainer import DMTTrainer, SMTTrainer, TASK, make_trainer

folder, world, rank = sys.argv[1], int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
for name, cls in (("smt", SMTTrainer), ("dmt", DMTTrainer)):
    settings = dict(max_steps=3, ddp_backend="gloo", per_device_train_batch_size=8 // world, label_every=1)
    settings |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=100.0)
    if cls is SMTTrainer:  # every row the same memories, whatever the process draws
        settings |= dict(first_share=1.0, coef_uniformity=0.0)
    trainer = make_trainer(f"{folder}/{name}-{rank}", cls, data=[TASK[i] for i in range(64)], **settings)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_drift", "eval_dynamics"} <= set(metrics)
    for part in ("model", "teacher"):
        save_file(dict(getattr(trainer, part).named_parameters()), f"{folder}/{name}-{part}-{rank}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads do not survive the interpreter's end
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of every process's networks, for 1 and 2 processes of one thread each."""
    folder = tmp_path_factory.mktemp("smt")
    (folder / "train.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TESTS": os.path.dirname(__file__)}
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone", str(folder / "train.py")]
        command = [sys.executable, *launch, str(folder / str(world))]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", ["smt", "dmt"])
@pytest.mark.parametrize("network", ["model", "teacher"])
def test_processes_agree(method, network, runs):
    one, first, second = (
        load_file(runs / world / f"{method}-{network}-{rank}") for world, rank in (("1", 0), ("2", 0), ("2", 1))
    )
    for name in one:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-6)
