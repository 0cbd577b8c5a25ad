"""What does a state that goes on from batch to batch teach, and what does the gradient of long rows?

    python benchmarks/streams.py --data tinyshakespeare.txt

The same 8,192 tokens a step, and as many steps, in three layouts: "windows" of 128 tokens, each from an empty state, in
random order; "truncated", 64 streams read 128 tokens at a time, whose state goes on and whose gradient does not; and
"exact", 4 streams read 2,048 at a time, with their whole gradient. Text: minGRU and LSTM of 350,000 parameters on 90%
of it; held-out bits per byte of the last 5% as one stream, over the distance from the start, and of windows of 128.
Retrieval (`hf_rnn.tasks.Retrieval`): the answer is at least 16, 32, 128, 512 or 1,024 tokens back, five architectures
of two blocks of width 64; accuracy on rows not seen. `RecurrentTrainer` with AdamW, rates tuned for none: 0.01 with a
cosine schedule. On a CPU every run has one thread, and as many run at once as there are cores.
"""

import argparse
import math
import tempfile

import torch
from datasets import Dataset
from driver import GPU, RESULTS, save, sized
from models import make
from quality import read, split
from resumable import finish, run_all
from transformers import set_seed

import hf_rnn
from hf_rnn.tasks import Retrieval
from hf_rnn.tasks.evaluation import loss_by_position, stream_loss

WINDOW, LONG, TOKENS = sized((128, 2048, 8192), (128, 2048, 8192), (4, 16, 32))
LAYOUTS = {"windows": WINDOW, "truncated": WINDOW, "exact": LONG}
SEEDS, STEPS, PARAMETERS = (0, 1, 2), sized(300, 300, 2), 350_000
DISTANCES = sized((16, 32, 128, 512, 1024), (16, 32, 128, 512, 1024), (2, 4))
TEXT_MODELS = ("minGRU", "LSTM")
SMALL = {"minGRU": "MinGRU", "minLSTM": "MinLSTM", "LSTM": "LSTM", "GRU": "GRU", "xLSTM": "XLSTM"}


def fit(model, documents: Dataset, layout: str, seed: int) -> dict:
    """Train on a corpus in one of the layouts."""
    length = LAYOUTS[layout]
    if layout == "windows":
        names = documents.column_names
        cut = {n: [x for row in documents.with_format("torch")[n] for x in row.split(WINDOW)] for n in names}
        documents = Dataset.from_dict({n: [x.tolist() for x in rows] for n, rows in cut.items()}).shuffle(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = hf_rnn.RecurrentTrainingArguments(
            folder, report_to="none", use_cpu=not GPU, save_strategy="no", disable_tqdm=True, logging_steps=20,
            max_steps=STEPS, per_device_train_batch_size=TOKENS // length, stream=True, stream_length=length, seed=seed,
            learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.01,
        )  # fmt: skip
        trainer = hf_rnn.RecurrentTrainer(model, args, train_dataset=documents)
        metrics = trainer.train().metrics
        curve = [(e["step"], float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    return {"seconds": metrics["train_runtime"], "training_loss": curve}


def text(name: str, layout: str, seed: int, data: str | None) -> dict:
    training, _, test = split(read(data))
    set_seed(seed)
    model = make(name, PARAMETERS, 256)
    found = fit(model, Dataset.from_dict({"input_ids": [training.tolist()]}), layout, seed)
    model.eval()
    far = loss_by_position(model, test, rows=4)
    beyond = {at: loss for at, loss in far.items() if at >= WINDOW}
    read_there = len(test) // 4 - WINDOW
    weights = [min(at, read_there + WINDOW - at) for at in beyond]
    rows = test[: len(test) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        windows = sum(
            float(model(input_ids=rows[i : i + 64], labels=rows[i : i + 64]).loss) * len(rows[i : i + 64])
            for i in range(0, len(rows), 64)
        ) / len(rows)
    return found | {
        "parameters": model.num_parameters(),
        "stream": stream_loss(model, test) / (len(test) - 1) / math.log(2),
        "beyond": sum(w * loss for w, loss in zip(weights, beyond.values(), strict=True)) / sum(weights) / math.log(2),
        "windows": windows / math.log(2),
        "by_position": {str(at): loss / math.log(2) for at, loss in far.items()},
    }


def retrieval(name: str, layout: str, distance: int, seed: int) -> dict:
    task = Retrieval(length=2 * distance - 1, seed=seed)
    set_seed(seed)
    config = getattr(hf_rnn, f"{SMALL[name]}Config")(
        vocab_size=task.vocab_size, hidden_size=64, num_hidden_layers=2, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = getattr(hf_rnn, f"{SMALL[name]}ForCausalLM")(config)
    count = STEPS * TOKENS // (2 * distance) + TOKENS // LONG
    documents = Dataset.from_list([{n: x.tolist() for n, x in task[i].items()} for i in range(count)])
    found = fit(model, documents, layout, seed)
    held_out = [task[-i] for i in range(1, 1 + sized(128, 128, 4))]
    ids, labels = (torch.stack([row[n] for row in held_out]) for n in ("input_ids", "labels"))
    with torch.no_grad():
        answers = [model.eval()(some, logits_to_keep=2).logits[:, 0].argmax(-1) for some in ids.split(16)]
    return found | {"accuracy": float((torch.cat(answers) == labels[:, -1]).double().mean())}


def picture(results: dict) -> None:
    """Bits over the distance from the start, by layout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 2, sharey=True), results["text"].items(), strict=True):
        for layout, runs in rows.items():
            positions = [int(at) for at in runs[0]["by_position"]]
            means = [sum(run["by_position"][str(at)] for run in runs) / len(runs) for at in positions]
            axes.plot(positions, means, marker="o", label=layout)
        axes.axvline(WINDOW, color="grey", linestyle="--", linewidth=1)
        axes.axvline(LONG, color="grey", linestyle=":", linewidth=1)
        axes.set(title=name, xlabel="bytes since the start", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out bits a byte")
    figure.axes[0].legend()
    figure.savefig(RESULTS / f"streams_{'gpu' if GPU else 'cpu'}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file; default: CPython's documentation")
    parser.add_argument("--retrieval-seeds", type=int, default=len(SEEDS), help="seeds of the retrieval runs")
    options = parser.parse_args()
    texts = {(n, la, s): (n, la, s, options.data) for n in TEXT_MODELS for la in LAYOUTS for s in SEEDS}
    runs = run_all("streams", text, {f"text, {n}, {la}, {s}": job for (n, la, s), job in texts.items()})
    found = dict(zip(texts, runs.values(), strict=True))
    results = {
        "text": {n: {la: [found[n, la, s] for s in SEEDS] for la in LAYOUTS} for n in TEXT_MODELS},
        "retrieval": {},
    }
    seeds = SEEDS[: options.retrieval_seeds]
    jobs = {(n, la, d, s): (n, la, d, s) for s in seeds for d in DISTANCES for la in LAYOUTS for n in SMALL}
    runs = run_all("streams", retrieval, {", ".join(map(str, key)): job for key, job in jobs.items()})
    answers = dict(zip(jobs, runs.values(), strict=True))
    results["retrieval"] = {
        n: {la: {str(d): [answers[n, la, d, s] for s in seeds] for d in DISTANCES} for la in LAYOUTS} for n in SMALL
    }
    for name, rows in results["text"].items():
        for layout, row in rows.items():
            means = {key: sum(run[key] for run in row) / len(row) for key in ("stream", "beyond", "windows", "seconds")}
            print(f"{name:8} {layout:10}" + "".join(f"  {key} {value:.3f}" for key, value in means.items()))
    for name, rows in results["retrieval"].items():
        for layout, row in rows.items():
            told = (f"{d}: " + " ".join(f"{run['accuracy']:.2f}" for run in some) for d, some in row.items())
            print(f"{name:8} {layout:10}  " + "  ".join(told))
    picture(results)
    save("streams", results)
    finish("streams")


if __name__ == "__main__":
    main()
