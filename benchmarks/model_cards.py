"""One card per architecture in model_cards/, from the committed results of the benchmarks.

python benchmarks/model_cards.py
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_model
import state_tracking
from driver import RESULTS
from huggingface_hub import ModelCardData

import hf_rnn
from hf_rnn.tasks import Retrieval
from hf_rnn_trainers.model_card.card import CODE_LICENCE, Evaluation, Training, render
from hf_rnn_trainers.model_card.papers import ARCHITECTURES

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
NO_WEIGHTS = "No weights are published with this card; a checkpoint that you train and share gets a card of its own."
LIMITS = (
    "These are small networks, measured on small tasks on a CPU; nothing is claimed beyond the tables. They remember "
    "earlier text only as far as the state can hold it."
)
STATE_TRACKING = {
    "GRU": ["GRU, GRU"],
    "LSTM": ["LSTM, LSTM"],
    "MinGRU": ["minGRU, minGRU", "minGRU, attention"],
    "XLSTM": ["sLSTM, sLSTM", "mLSTM, mLSTM", "sLSTM, mLSTM"],
}


def results(question: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{question}_cpu.json").read_text())


def source(question: str) -> str:
    """Where the numbers of a table are from."""
    about = results(question)
    return (
        f"Measured by `python benchmarks/{question}.py` on {about['date']}, {about['device']}: "
        f"[results](../benchmarks/results/{question}_cpu.json)."
    )


def language(stem: str) -> Evaluation:
    rows = results("language_model")["results"]
    columns = ["architecture", "channels", "parameters", "held-out bits per byte", "seconds of training"]
    cells = [
        [n, r["channels"], r["parameters"], f"{r['bits_per_byte']:.3f}", f"{r['training_seconds']:.0f}"]
        for n, r in rows.items()
    ]
    text = (
        "Bits per byte on held-out documentation of CPython, less is better. Parameters, steps, learning rate and "
        "schedule are the same for all"
    )
    return Evaluation("A byte-level language model", f"{text}. {source('language_model')}", columns, cells)


def tracking(stem: str) -> Evaluation:
    rows = results("state_tracking")["results"]
    sizes = [(task, factor) for task in rows for factor in (1, 2, 4)]
    header = ["two layers", *(f"{task}, {int(state_tracking.SIZES[task] * f)}" for task, f in sizes)]
    cells = []
    for name in STATE_TRACKING[stem]:
        scores = [state_tracking.score(rows[task][name], task, factor) for task, factor in sizes]
        cells.append([name, *(f"{statistics.mean(s):.2f} ({min(s):.2f})" for s in scores)])
    text = (
        "Accuracy on new strings, mean (worst) of 3 seeds, by the size of the string. Parity: the last bit, trained on "
        "up to 40 bits. Recall: the values of keys among pairs read before, trained on up to 16 pairs. Selective "
        "copying: four symbols among blanks, trained on up to 32 tokens"
    )
    return Evaluation(
        "State tracking, recall and selective copying", f"{text}. {source('state_tracking')}", header, cells
    )


def retrieval(stem: str) -> Evaluation:
    rows = results("memory_retrieval")["results"]["same steps"]
    header = ["task", "tokens", "seed", "updater", "chance", "SMT", "then DMT", "backpropagation through time"]
    cells = [
        [r["name"], r["T"], r["seed"], r["updater"], *(f"{r[key]:.3f}" for key in ("chance", "smt", "smt_dmt", "bptt"))]
        for r in rows
    ]
    text = "Accuracy of the student alone, starting from the empty memory; each method with the same number of steps"
    return Evaluation("Retrieval with one late label", f"{text}. {source('memory_retrieval')}", header, cells)


def speed(stem: str) -> Evaluation:
    rows = results("xlstm")["results"]
    header = ["what", "hf_rnn, ms", "transformers' xlstm, ms", "matrix products alone, ms"]
    cells = [
        [what, *(f"{rows[what][who]['ms']:.0f}" for who in ("hf_rnn", "transformers", "matrix products alone"))]
        for what in ("training step of 512", "prompt of 512", "prompt of 575")
    ]
    text = "Time, less is better, with the same weights in both: vocabulary 256, width 256, 4 layers, batch 4"
    return Evaluation("Speed", f"{text}. {source('xlstm')}", header, cells)


TABLES: dict[str, list[Callable[[str], Evaluation]]] = {
    "MemoryRNN": [retrieval],
    "XLSTM": [tracking, speed],
}


def tables(stem: str) -> list[Evaluation]:
    """The tables of an architecture: its own, or else those of language modelling."""
    others = [language, tracking] if stem in STATE_TRACKING else [language]
    return [table(stem) for table in TABLES.get(stem, others)]


QUESTION = {"MemoryRNN": "memory_retrieval", "XLSTM": "state_tracking"}  # others: language_model


def snippet(stem: str) -> str:
    """Makes the measured network."""
    xlstm_vocabulary = state_tracking.KEYS + state_tracking.VALUES
    settings = {
        "XLSTM": f"vocab_size={xlstm_vocabulary}, hidden_size=64, num_hidden_layers=2, "
        'block_layout="neurips", slstm_at=[0]',
        "MemoryRNN": f"vocab_size={Retrieval(length=32).vocab_size}, hidden_size=64, num_memory_tokens=2, "
        'updater="mlp"',
    }
    sizes = ""
    if stem not in settings:
        channels = results("language_model")["results"][stem]["channels"]
        width = language_model.SETTINGS["hidden_size"]
        told = [f"{name}={value}" for name, value in language_model.SIZES.items()]
        sizes = f"sizes = dict({', '.join(told)}, expansion_factor={channels} / {width})\n"
        settings[stem] = '**sizes, block_layout="paper", initializer_range=0.02'
    return f"""# pip install hf-rnn
import hf_rnn

{sizes}config = hf_rnn.{stem}Config({settings[stem]})
model = hf_rnn.{stem}ForCausalLM(config)
print(f"{{model.num_parameters():,}} parameters")"""


def training(stem: str) -> Training:
    if stem == "MemoryRNN":
        return Training(
            "Supervised Memory Training, then DAgger Memory Training, on `hf_rnn.tasks.Retrieval`: find a needle among "
            "distractors, asked for at the end.",
            {"steps of SMT and DMT together": results("memory_retrieval")["results"]["same steps"][0]["steps"]},
            ("kumar2026smt",),
        )
    if stem == "XLSTM":
        rows = results("state_tracking")["results"]
        steps = max(run["steps"] for task in rows.values() for row in task.values() for run in row["runs"])
        return Training(
            "Backpropagation through time, with new strings of the task in every batch.",
            {"batch": state_tracking.BATCH, "learning rate": "the better of 0.003 and 0.01", "steps, at most": steps},
            ("werbos1990bptt",),
        )
    row = results("language_model")["results"][stem]
    return Training(
        "Backpropagation through time (`RecurrentTrainer`) on the documentation inside CPython "
        "(`pydoc_data.topics`), byte by byte.",
        {
            "steps": row["steps"],
            "batch": language_model.BATCH,
            "sequence length, tokens": language_model.BLOCK,
            "learning rate": language_model.LEARNING_RATE,
        },
        ("werbos1990bptt",),
    )


def card(stem: str, model_type: str) -> str:
    known, about = ARCHITECTURES[model_type], results(QUESTION.get(stem, "language_model"))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0",
        tags=["hf_rnn", "recurrent", model_type],
    )
    measured = {"XLSTM": results("state_tracking")["results"]["recall"]["sLSTM, mLSTM"]}
    size = (results("language_model")["results"] | measured).get(stem, {}).get("parameters")
    return (
        str(
            render(
                data,
                known.name,
                known,
                f"The architecture `{model_type}` of the package hf_rnn. {NO_WEIGHTS}"
                + (f" The snippet makes the network that was measured, with {size:,} parameters." if size else ""),
                snippet(stem),
                "",
                training(stem),
                tables(stem),
                f"{about['device']}, Python {about['python']}",
                about["versions"],
                LIMITS,
                CODE_LICENCE,
            )
        )
        + "\n"
    )


def main() -> None:
    for stem, name in hf_rnn.ARCHITECTURES.items():
        path = CARDS / f"{name}.md"
        path.write_text(card(stem, f"hf_rnn_{name}"))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
