"""The presets of SMT and DMT beside backpropagation through time, whole and truncated, and beside DMT without a
teacher: nats per token of held-out rows from the empty memory, CPU seconds of the process, one network for all.

python benchmarks/memory_presets.py PART [--seeds 0 1 2] [--runs bptt dense:8 ...] [--data my.txt]

Parts: seconds (CPU milliseconds of a step of each), text (rows of 64, equal steps), long and longer (rows of 256 and
1,024, equal CPU seconds, which needs `seconds` first), lstm and gru (text with students that have gates), pixels
(digits). Without --data text is the documentation in CPython. Rows that are there already are not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from driver import RESULTS, save
from memory_language import mean_loss
from memory_training import COMMON, Clock, bptt, fit, student
from transformers import set_seed

import hf_rnn
from hf_rnn import DMTConfig, DMTTrainer, RecurrentTrainer, RecurrentTrainingArguments, SMTConfig, SMTTrainer
from hf_rnn.cli.data import blocks, read_documents, tokenize
from hf_rnn.tasks import digits

PATH = RESULTS / "memory_presets_cpu.json"
LEVELS = 8
Contestants = dict[str, tuple[int, int]]  # name to rows and tokens of a row in training


class Part(NamedTuple):
    """What is compared; `tokens` of the rows that are held out. `seconds`: as many CPU seconds for all as the first of
    the contestants takes for its steps, else as many steps."""

    network: str
    tokens: int
    runs: Contestants
    rates: tuple[float, ...] = (2e-3,)
    steps: tuple[int, int] = (200, 50)
    seconds: bool = False


SHORT, LONG, LONGER = (16, 64), (4, 256), (1, 1024)
METHODS = ("bptt", "alone:8", "alone:1", "dense:8", "dense:1")
GATED = dict.fromkeys(("bptt", "alone:8", "dense:8"), SHORT)
ONE_ROW = ("dense:8", "bptt", "alone:8", "truncated:8")
PARTS = {
    "text": Part("memory", 64, dict.fromkeys((*METHODS, "dense:0", "truncated:8"), SHORT)),
    "long": Part("memory", 256, dict.fromkeys(ONE_ROW, LONG) | {"bptt 64": SHORT}, seconds=True),
    "longer": Part("memory", 1024, dict.fromkeys(ONE_ROW, LONGER) | {"bptt 64": SHORT}, seconds=True),
    "lstm": Part("lstm", 64, GATED, rates=(3e-3,)),
    "gru": Part("gru", 64, GATED, rates=(3e-3,)),
    "pixels": Part("memory", 64, dict.fromkeys(("bptt", "alone:8", "dense:8"), SHORT)),
}


class Steps(Clock):
    """CPU seconds of each step of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.each: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.each.append(time.process_time() - self.begun)
        super().on_step_end(args, state, control, **kwargs)


Clocks = tuple[Clock, Clock]  # of SMT and of DMT; of what has one part, the first


def network(kind: str, vocab_size: int, seed: int) -> Any:
    """About as many parameters as the memory RNN of 4 x 64: an LSTM or GRU of one layer of 256 units."""
    if kind == "memory":
        return student(vocab_size, seed, tokens=4, size=64)
    set_seed(seed)
    config, model = {
        "lstm": (hf_rnn.LSTMConfig, hf_rnn.LSTMForCausalLM),
        "gru": (hf_rnn.GRUConfig, hf_rnn.GRUForCausalLM),
    }[kind]
    names = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes = dict(hidden_size=256, num_hidden_layers=1, conv_kernel=0, expansion_factor=1)
    return model(config(vocab_size=vocab_size, **sizes, **names))


def train(
    preset: str, model: Any, data: Any, steps: tuple[int, int], smt: dict, dmt: dict, clocks: Clocks, **both: Any
) -> dict:
    """SMT and DMT by a preset, DMT with the optimizer that SMT leaves; returns what SMT logged last."""
    common = {name: COMMON[name] for name in ("report_to", "use_cpu", "disable_tqdm", "dataloader_pin_memory")}
    common |= dict(logging_steps=max(1, steps[0] // 8)) | both
    with tempfile.TemporaryDirectory() as folder:
        kept = dict(save_strategy="steps", save_steps=steps[0])
        args = SMTConfig.preset(preset, folder, max_steps=steps[0], **smt | kept | common)
        trainer = SMTTrainer(model, args, train_dataset=data, callbacks=[clocks[0]])
        quietly(trainer).train()
        logged = [entry for entry in trainer.state.log_history if "dynamics" in entry][-1]
        kept = dict(save_strategy="no", optimizer_from=f"{folder}/checkpoint-{steps[0]}")
        args = DMTConfig.preset(preset, str(Path(folder) / "dmt"), max_steps=steps[1], **dmt | kept | common)
        quietly(DMTTrainer(model, args, trainer.teacher, train_dataset=data, callbacks=[clocks[1]])).train()
    names = ("decoder_first", "dynamics", "readout", "student")
    return {name: float(logged[name]) for name in names if name in logged}


def quietly(trainer: Any) -> Any:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def dense(model: Any, data: Any, k: int, steps: tuple[int, int], rate: float, clocks: Clocks, **both: Any) -> dict:
    """With k steps of the student; 0: no label's gradient comes into the updater, which learns from the teacher's
    memories alone, by the paper's coefficients. DMT at half of SMT's rate."""
    if k:
        smt, dmt = dict(student_steps=k), dict(readout_steps=k)
    else:
        smt = dict(student_steps=1, coef_student=0.0, coef_dynamics=0.1)
        dmt = dict(readout_steps=0, coef_dynamics=10.0, label_every=4)
    smt, dmt = smt | dict(learning_rate=rate), dmt | dict(learning_rate=rate / 2)
    return train("dense", model, data, steps, smt, dmt, clocks, context_size=4096, **both)


def learn(
    name: str,
    model: Any,
    data: Any,
    steps: tuple[int, int],
    seed: int,
    rate: float,
    rows: int,
    clocks: Clocks,
    **others: Any,
) -> dict:
    """Train by a method; returns what it logged of its teacher, if it has one."""
    method, _, k = name.partition(":")
    both = dict(seed=seed, per_device_train_batch_size=rows) | others
    if method == "dense":
        return dense(model, data, int(k), steps, rate, clocks, **both)
    settings = dict(max_steps=sum(steps), learning_rate=rate, warmup_steps=0.1) | both
    if method == "alone":
        settings |= dict(readout_steps=int(k))
        fit(DMTTrainer, DMTConfig, model, data, settings, clocks[0], teacher=False)
    elif method == "truncated":
        settings |= dict(backprop="truncated", chunk_size=int(k))
        fit(RecurrentTrainer, RecurrentTrainingArguments, model, data, settings, clocks[0])
    else:
        bptt(model, data, sum(steps), clocks[0], **settings)
    return {}


def documents(path: str | None) -> tuple[Any, Any]:
    """Tokens to learn from, and those held out."""
    texts = read_documents(path, "train", "text") if path else ["\n\n".join(topics.values())]
    stream, _ = tokenize(texts, hf_rnn.byte_tokenizer())
    cut = int(0.95 * len(stream))
    return stream[:cut], stream[cut:]


def data_of(name: str, part: Part, tokens: int, path: str | None) -> tuple[Any, Any, int]:
    """Rows of so many tokens to learn from, rows of the part's held out, and the size of the vocabulary."""
    if name == "pixels":
        return digits("train", LEVELS), list(digits("test", LEVELS)), LEVELS + 1
    seen, unseen = documents(path)
    count = max(16, 8192 // part.tokens)
    return blocks(seen, tokens + 1), list(blocks(unseen, part.tokens + 1))[:count], 259


def run(name: str, part: Part, found: dict, steps: tuple[int, int], path: str | None) -> dict:
    """`found` says which run, seed and rate; returns it with what came out."""
    rows, tokens = part.runs[found["run"]]
    data, held_out, vocab_size = data_of(name, part, tokens, path)
    model = network(part.network, vocab_size, found["seed"])
    start = time.process_time()
    logged = learn(found["run"].split()[0], model, data, steps, found["seed"], found["rate"], rows, (Clock(), Clock()))
    seconds = time.process_time() - start
    found |= dict(steps=steps, loss=mean_loss(model.eval(), held_out), cpu_seconds=seconds) | logged
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}, flush=True)
    return found


def seconds(names: list[str], results: dict) -> None:
    """The least CPU milliseconds of a step of each contestant, of two rounds in turn; of SMT and of DMT."""
    found = results.setdefault("seconds", {})
    for name in names:
        part, times = PARTS[name], found.setdefault(name, {})
        for method in [*part.runs] * 2:
            rows, tokens = part.runs[method]
            data, _, vocab_size = data_of(name, part, tokens, None)
            clocks = Steps(), Steps()
            learn(method.split()[0], network(part.network, vocab_size, 0), data, (6, 6), 0, 2e-3, rows, clocks)
            least = [1e3 * min(clock.each) for clock in clocks if clock.each]
            times[method] = [min(pair) for pair in zip(least, times.get(method, least), strict=True)]
        print(name, times, flush=True)
        save("memory_presets", results)


def within(times: dict[str, list[float]], first: str, method: str, steps: tuple[int, int]) -> tuple[int, int]:
    """As many steps as fit into the seconds that the first contestant's take."""
    if method == first:
        return steps
    budget = sum(n * ms for n, ms in zip(steps, times[first], strict=True))
    return int(budget / times[method][0]), 0


def one_part(name: str, seeds: list[int], runs: list[str] | None, rates: list[float], path: str | None) -> None:
    part = PARTS[name]
    results = json.loads(PATH.read_text())["results"] if PATH.exists() else {}
    rows = results.setdefault(name, [])
    for seed in seeds:
        for method in runs or part.runs:
            steps = part.steps
            if part.seconds:
                steps = within(results["seconds"][name], next(iter(part.runs)), method, part.steps)
            for rate in rates or part.rates:
                key = dict(run=method, seed=seed, rate=rate)
                if not any(key.items() <= row.items() for row in rows):
                    rows.append(run(name, part, key, steps, path))
                    save("memory_presets", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["seconds", *PARTS])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="*", help="of the part's; default: all. Of `seconds`, which parts")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="default: the part's")
    parser.add_argument("--data", help="a text file or data set")
    options = parser.parse_args()
    if options.part == "seconds":
        seconds(options.runs or [*PARTS], json.loads(PATH.read_text())["results"] if PATH.exists() else {})
    else:
        one_part(options.part, options.seeds, options.runs, options.rates, options.data)


if __name__ == "__main__":
    main()
