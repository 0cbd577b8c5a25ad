"""Faults, injected into runs in processes of their own: what is lost, and which resumed run differs from one without.

    python benchmarks/faults.py [--kills 100] [--trainers backpropagation stream zo smt rate]

Every run is the same few steps with dropout, saved after each; the weights after each step of a run that nothing
happens to are what every other has to come to, bit for bit (after a change of the number of processes to 1e-5).
"stream" is backpropagation over pieces of streams, whose state is a part of each checkpoint.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from driver import save
from tqdm import tqdm
from transformers import TrainerCallback

import hf_rnn
from hf_rnn_trainers.reliability.manifest import checkpoints, find_damage, newest_whole

STEPS = 8
TRAINERS = {
    "backpropagation": (hf_rnn.RecurrentTrainer, hf_rnn.RecurrentTrainingArguments, dict(optim="adamw_torch")),
    "zo": (hf_rnn.ZOTrainer, hf_rnn.ZOConfig, dict(num_directions=4, optim="adamw_torch")),
    "smt": (hf_rnn.SMTTrainer, hf_rnn.SMTConfig, dict(context_size=8, positions_per_sequence=4)),
    "rate": (hf_rnn.RateConstrainedTrainer, hf_rnn.RateConstrainedConfig, dict(rate_shrink=0.03, rate_every=2)),
    "stream": (
        hf_rnn.RecurrentTrainer,
        hf_rnn.RecurrentTrainingArguments,
        dict(optim="adamw_torch", stream=True, stream_length=8, backprop="chunked", chunk_size=3),
    ),
}


class Watched(TrainerCallback):
    """Digests of the weights after each step, by step; and what a fault needs to happen at one."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None):
        self.digests: dict[int, str] = {}
        self.at_step = at_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        self.digests[state.global_step] = hashlib.sha256(weights).hexdigest()
        self.at_step(state.global_step)


def make_trainer(name: str, folder: Path, watched: TrainerCallback, said: int | None = None, bad_step=None, **settings):
    """A trainer of a small model with dropout; it writes "s" and "e" to `said` where a save starts and ends."""
    trainer_class, args_class, own = TRAINERS[name]

    class Told(trainer_class):
        def _save_checkpoint(self, *args):
            if said is not None:
                os.write(said, b"s")
            super()._save_checkpoint(*args)
            if said is not None:
                os.write(said, b"e")

        def training_step(self, model, inputs, *args):
            if self.state.global_step == bad_step:
                with torch.no_grad():
                    self.model.model.norm.weight.fill_(float("nan"))
            return super().training_step(model, inputs, *args)

    torch.manual_seed(0)
    rows = torch.randint(0, 60, (3 * 2 * STEPS // 4, 12))  # more than one epoch
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, hidden_dropout=0.2, conv_kernel=0)
    sizes |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**sizes | settings.pop("model", {})))
    defaults = dict(max_steps=STEPS, save_steps=1, save_total_limit=2, per_device_train_batch_size=2, logging_steps=1)
    defaults |= dict(learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, output_dir=str(folder))
    data = [{"input_ids": row, "labels": row} for row in rows]
    if name == "stream":  # an epoch of five steps, one document longer than a step
        data = Dataset.from_dict({"input_ids": [rows[:3].flatten().tolist(), *rows[3:7].tolist()]})
    return Told(model, args_class(**defaults | own | settings), train_dataset=data, callbacks=[watched])


def run(name: str, folder: Path, resume=None, prepare=None, **options) -> tuple[dict[int, str], str]:
    """Train; the digests, and how it ended: "", or an error."""
    watched = Watched(**{"at_step": prepare} if prepare else {})
    trainer = make_trainer(name, folder, watched, **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        return watched.digests, f"{type(error).__name__}: {error}"
    return watched.digests, ""


class Child:
    """A forked process that runs a function and leaves what it returns in a file."""

    def __init__(self, function: Callable, *args, environment: dict[str, str] | None = None, **kwargs):
        self.result = Path(tempfile.mkstemp(suffix=".json")[1])
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            signal.alarm(120)  # nothing here takes so long
            tqdm.set_lock(threading.RLock())  # its own is shared, and a process that is killed may hold it
            try:
                os.environ.update(environment or {})
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                self.result.write_text(json.dumps(function(*args, **kwargs)))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                os._exit(code)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self):
        """Exit status, and what it returned, if it did."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = self.result.read_text()
        self.result.unlink()
        return status, json.loads(text) if text else None


class Tally:
    """Faults injected, checkpoints lost, wrong resumes; and what they were."""

    def __init__(self):
        self.faults = self.lost = self.wrong = 0
        self.notes: list[str] = []

    def judge(self, name: str, folder: Path, straight: dict, saved: int, what: str) -> None:
        """After a fault: is the checkpoint of step `saved` or a later one whole, and does a resumed run come to
        the same weights?"""
        self.faults += 1
        path, _ = newest_whole(folder)
        step = int(path.name.split("-")[1]) if path else 0
        if step < saved:
            staged = [p for p in checkpoints(folder / "_saving") if find_damage(p) is None]  # put in place at start
            step = max([step, *(int(p.name.split("-")[1]) for p in staged)])
        if step < saved:
            self.lost += 1
            self.notes.append(f"{name}, {what}: lost step {saved}, the newest is {step}")
        found = Child(run, name, folder, resume=True if step else None).wait()[1]
        self.compare(straight, found, what=f"{name}, {what}")

    def compare(self, straight: dict, found, what: str) -> None:
        digests, error = found if found is not None else ({}, "died")
        wrong = error or any(straight.get(step) != digest for step, digest in digests.items())
        if wrong or (digests and max(map(int, digests)) != STEPS):
            self.wrong += 1
            self.notes.append(f"{what}: {error or 'other weights'}")

    def row(self) -> dict:
        return {"faults": self.faults, "lost": self.lost, "wrong": self.wrong, "notes": self.notes}


def killed(name: str, folder: Path, straight: dict, count: int) -> dict:
    """SIGKILL at a random moment of a random save, `count` times."""
    tally, chance = Tally(), random.Random(0)
    durations = [0.05]
    for trial in tqdm(range(count), desc=f"{name}: killed", leave=False, disable=None):
        here = folder / f"kill-{trial}"
        reading, writing = os.pipe()
        child = Child(run, name, here, said=writing)
        os.close(writing)
        saves = chance.randint(1, STEPS)
        done = 0
        for index in range(saves):
            if os.read(reading, 1) != b"s":
                break
            start = time.perf_counter()
            if index == saves - 1:
                time.sleep(chance.uniform(0, 1.2 * max(durations[-20:])))
                break
            os.read(reading, 1)
            durations.append(time.perf_counter() - start)
            done += 1
        child.kill(signal.SIGKILL)
        child.wait()
        rest = b""
        while block := os.read(reading, 64):
            rest += block
        os.close(reading)
        tally.judge(name, here, straight, done + rest.count(b"e"), f"kill {trial}")
        shutil.rmtree(here, ignore_errors=True)
    return tally.row()


def damaged(name: str, folder: Path, straight: dict) -> dict:
    """Every file of the newest checkpoint removed, cut and changed in a bit, one after another."""
    tally, chance = Tally(), random.Random(0)
    whole = folder / "whole"
    Child(run, name, whole).wait()
    newest = checkpoints(whole)[0]
    files = [path.relative_to(whole) for path in sorted(newest.rglob("*")) if path.is_file()]
    for file in tqdm(files, desc=f"{name}: damaged", leave=False, disable=None):
        for how in ("removed", "cut", "emptied", "flipped"):
            here = folder / "damaged"
            shutil.copytree(whole, here)
            path = here / file
            content = bytearray(path.read_bytes())
            if how == "removed":
                path.unlink()
            elif how == "flipped":
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                path.write_bytes(content)
            else:
                path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
            tally.judge(name, here, straight, STEPS - 1, f"{file} {how}")
            shutil.rmtree(here)
    return tally.row()


def full(name: str, folder: Path, straight: dict) -> dict:
    """No file may grow beyond a limit, from a random step on: the run has to stop and say so."""
    tally, chance = Tally(), random.Random(0)
    Child(run, name, folder / "sizes").wait()
    largest = max(p.stat().st_size for p in checkpoints(folder / "sizes")[0].rglob("*") if p.is_file())
    for trial in range(6):
        step, limit = chance.randint(2, STEPS), chance.randrange(largest)
        here = folder / f"full-{trial}"

        def fill(at: int, step=step, limit=limit) -> None:
            if at == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        found = Child(_reported, name, here, fill).wait()[1]
        if not found or "CheckpointError" not in found or "is whole" not in found:
            tally.notes.append(f"{name}, {limit} bytes at step {step}: {found}")
            tally.wrong += 1
        tally.judge(name, here, straight, step - 1, f"{limit} bytes at most from step {step} on")
    return tally.row()


def _reported(name: str, folder: Path, prepare: Callable) -> str:
    error = run(name, folder, prepare=prepare)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return error


def told(name: str, folder: Path, straight: dict, count: int) -> dict:
    """SIGTERM or SIGINT at a random moment, and again soon after: saved, and 128 + the signal as exit status."""
    tally, chance = Tally(), random.Random(0)
    for trial in tqdm(range(count), desc=f"{name}: told to end", leave=False, disable=None):
        here, number = folder / f"told-{trial}", chance.choice([signal.SIGTERM, signal.SIGINT])
        reading, writing = os.pipe()
        child = Child(run, name, here, said=writing, save_steps=100)
        os.close(writing)
        while not (here / "started").exists() and not _started(child.pid):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        child.kill(number)
        os.read(reading, 1)  # a save begins
        time.sleep(chance.uniform(0, 0.04))
        child.kill(number)
        status, _ = child.wait()
        os.close(reading)
        if status != 128 + number:
            tally.wrong += 1
            tally.notes.append(f"{name}, signal {number}: exit status {status}")
        tally.judge(name, here, straight, 1, f"signal {number}")
    return tally.row()


def _started(pid: int) -> bool:
    """Whether the process has put its own handlers in place."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def poisoned(name: str, folder: Path, straight: dict) -> dict:
    """Weights that turn NaN in each of the steps: the run stops there, and saves none."""
    tally = Tally()
    for step in range(STEPS):
        here = folder / f"nan-{step}"
        error = (Child(run, name, here, bad_step=step).wait()[1] or [None, "died"])[1]
        if "NonFiniteLossError" not in error or f"step {step}" not in error:
            tally.wrong += 1
            tally.notes.append(f"{name}, NaN at step {step}: {error}")
        tally.judge(name, here, straight, step, f"NaN at step {step}")
    return tally.row()


def world_sizes(name: str, folder: Path) -> dict:
    """1 process, then 2, then 1, the batch of all the same: weights to 1e-5 of a run in 1."""
    tally = Tally()
    plain = dict(model=dict(hidden_dropout=0.0), save_total_limit=None)
    Child(run, name, folder / "straight", **plain).wait()
    here = folder / "changing"
    for step, world in ((3, 1), (6, 2), (STEPS, 1)):
        port = str(random.Random(os.getpid() + step).randint(20000, 60000))
        children = []
        for rank in range(world):
            shared = dict(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
            shared |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            rows = 2 if name == "zo" else 2 // world  # ZO's processes share directions, and each reads the whole batch
            until = dict(stop_at=step, per_device_train_batch_size=rows)
            until |= dict(ddp_backend="gloo") if world > 1 else {}
            arguments = dict(resume=step > 3 or None, **plain | until)
            children.append(Child(_until, name, here, environment=shared if world > 1 else {}, **arguments))
        for child in children:
            status, found = child.wait()
            if status or (found and found[1]):
                tally.notes.append(f"{name}, {world} processes until step {step}: {status} {found}")
        tally.faults += step > 3
    weights = [_weights(folder / run_ / f"checkpoint-{STEPS}") for run_ in ("straight", "changing")]
    if any(not w for w in weights):
        tally.lost += 1
    elif max(float((a - b).norm() / b.norm()) for a, b in zip(*weights, strict=True)) > 1e-5:
        tally.wrong += 1
        tally.notes.append(f"{name}: other weights after 1, 2 and 1 processes")
    return tally.row()


def _until(name: str, folder: Path, stop_at: int, **options):
    def stop(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        return run(name, folder, prepare=stop, **options)
    except SystemExit:
        return {}, ""


def _weights(folder: Path) -> list[torch.Tensor]:
    if find_damage(folder) is not None:
        return []
    return list(hf_rnn.GRUForCausalLM.from_pretrained(folder).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="saves that are killed, over all trainers")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--faults", nargs="+", default=["killed", "damaged", "full", "told", "poisoned", "world sizes"])
    parser.add_argument("--output", type=Path, help="a file for the counts; default: benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    kinds = {
        "killed": lambda *a: killed(*a, count=options.kills // len(options.trainers)),
        "damaged": damaged,
        "full": full,
        "told": lambda *a: told(*a, count=10),
        "poisoned": poisoned,
        "world sizes": lambda name, folder, straight: world_sizes(name, folder),
    }
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.trainers:
            found = Child(run, name, Path(folder) / name / "straight").wait()[1]
            if found is None or found[1]:
                raise RuntimeError(f"{name}: the run without a fault ended with {found}")
            for kind in options.faults:
                if (name, kind) == ("smt", "world sizes"):
                    continue  # its processes draw for themselves (docs/scaling.md)
                row = kinds[kind](name, Path(folder) / name, found[0])
                rows.append({"trainer": name, "fault": kind, **row})
                print(f"{name:16} {kind:12} {row['faults']:4} faults, {row['lost']} lost, {row['wrong']} wrong")
                for note in row["notes"]:
                    print(f"    {note}")
            total = report(rows, options.output, options.trainers)
    sys.exit(bool(total["lost"] or total["wrong"]))


def report(rows: list[dict], output: Path | None, trainers: list[str]) -> dict[str, int]:
    """Print and keep what there is so far: the whole takes long."""
    total = {key: sum(row[key] for row in rows) for key in ("faults", "lost", "wrong")}
    print(f"{total['faults']} faults injected, {total['lost']} checkpoints lost, {total['wrong']} wrong resumes")
    results = {"total": total, "rows": rows}
    if output is None:
        save("faults" if trainers == list(TRAINERS) else "faults_" + "_".join(trainers), results)
    else:
        output.write_text(json.dumps(results, indent=1))
    return total


if __name__ == "__main__":
    main()
