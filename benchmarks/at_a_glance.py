"""What README and docs/performance.md open with, from the results: two tables and two pictures."""

import statistics
from collections.abc import Callable
from pathlib import Path

from markdown_tables import Results, markdown, number

Load = Callable[[str], Results]
TRANSFORMER, MAMBA = "Transformer (transformers)", "Mamba (transformers)"
COLORS = {"minGRU": "C0", "LSTM": "C2", "Mamba": "C4", "Transformer": "C1"}
# Equal architectures with equal weights: ours, theirs, their name in the table
SAME = [
    ("minGRU", "minGRU-pytorch", "minGRU-pytorch"),
    ("LSTM", "torch.nn.LSTM", "torch.nn.LSTM"),
    ("GRU", "torch.nn.GRU", "torch.nn.GRU"),
    ("xLSTM", "transformers", "transformers' xLSTM"),
]
# The row of quality.py, that of state_tracking.py, and what both are called here
LEARNERS = [
    ("minGRU", "minGRU, minGRU", "minGRU"),
    ("minLSTM", None, "minLSTM"),
    ("GRU", "GRU, GRU", "GRU"),
    ("LSTM", "LSTM, LSTM", "LSTM"),
    ("sLSTM", "sLSTM, sLSTM", "xLSTM of sLSTM cells"),
    ("xLSTM, neurips", "mLSTM, mLSTM", "xLSTM of mLSTM cells"),
    ("minGRU and attention", "minGRU, attention", "minGRU and a layer of attention"),
    (MAMBA, MAMBA, "Mamba"),
    (TRANSFORMER, TRANSFORMER, "Transformer"),
]


def speed(load: Load) -> str:
    """How many times faster the package is: another's time over ours."""
    decoding = load("decoding")["results"]
    steps = load("training_step")["results"]["1,000,000 parameters"]
    large = load("decoding_sizes")["results"]["minGRU, 100,000,000 parameters"]
    scans = load("kernels")["results"]

    def beside(rows: Results, **names: str) -> dict[str, float]:
        return {label: rows[name]["ratio"] for label, name in names.items()}

    def equal(tables: Results, title: str) -> dict[str, float]:
        return {name: tables[title.format(ours, theirs)][theirs]["ratio"] for ours, theirs, name in SAME}

    both = {"Transformer": TRANSFORMER, "Mamba": MAMBA}
    only, peer = {"Transformer": TRANSFORMER}, {"minGRU-pytorch": "minGRU-pytorch"}
    llama = "llama.cpp's Mamba"
    rows: dict[tuple[str, str], tuple[str, dict[str, float]]] = {
        ("a token of one text after 1,024", "minGRU"):
            ("decoding", beside(decoding["minGRU, a token after 1024, batch 1"], **both)),
        ("a token of 64 texts after 8,192", "minGRU"):
            ("decoding", beside(decoding["minGRU, a token after 8192, batch 64"], **both)),
        ("a token of 64 texts after 8,192", "LSTM"):
            ("decoding", beside(decoding["LSTM, a token after 8192, batch 64"], **both)),
        ("a token, equal weights", "each cell"): ("decoding", equal(decoding, "{} and the same of {}, a token")),
        ("a token, 100 million parameters", "minGRU"):
            ("decoding_sizes", beside(large, Mamba=MAMBA, **{llama: "llama.cpp, Mamba, F32"})),
        ("the same in 8 bits", "minGRU"):
            ("decoding_sizes", {llama: large["llama.cpp, Mamba, Q8_0"]["ratio"] / large["hf_rnn, 8 bits"]["ratio"]}),
        ("a training step, 64 texts of 64", "minGRU"):
            ("training_step", beside(steps["minGRU, 64 x 64 tokens"], **both)),
        ("a training step, one text of 8,192", "minGRU"):
            ("training_step", beside(steps["minGRU, 1 x 8192 tokens"], **only)),
        ("a training step, one text of 8,192", "LSTM"):
            ("training_step", beside(steps["LSTM, 1 x 8192 tokens"], **only)),
        ("a training step, 8 texts of 512, equal weights", "each cell"):
            ("training_step", equal(steps, "{} and the same of {}")),
        ("the recurrence alone with its gradient, 16 texts of 4,096", "minGRU"):
            ("kernels", beside(scans["min_gru_scan forward + backward, 16 x 4096"], **peer)),
        ("the recurrence alone with its gradient, 16 texts of 4,096", "mLSTM"):
            ("kernels", beside(scans["mlstm_scan forward + backward, 16 x 4096"],
                               mlstm_kernels="mlstm_kernels native_autograd")),
    }  # fmt: skip
    return markdown(
        ["time of", "by hf_rnn's", "times faster than", "measured by"],
        [
            [
                what,
                ours,
                ", ".join(f"{peer} **{digits(x)}**" for peer, x in peers.items()),
                f"`benchmarks/{question}.py`",
            ]
            for (what, ours), (question, peers) in rows.items()
        ],
    )


def digits(ratio: float) -> str:
    return number(ratio, 2 if ratio < 100 else 3)


def quality(load: Load) -> str:
    """What each learns: text in nats a byte, the rest as accuracy."""
    models = load("quality")["results"]["models"]
    tracking = load("state_tracking")["results"]

    def accuracy(task: str, name: str | None, factor: str, key: str) -> str:
        if name is None:
            return "-"
        values = [run["accuracy"][factor][key] for run in tracking[task][name]["runs"] if factor in run["accuracy"]]
        return f"{statistics.mean(values):.2f}" if values else "-"

    rows = [
        [
            label,
            *(f"{models[row]['mean_test'][unit]:.3f}" for unit in ("steps", "seconds")),
            accuracy("parity", cells, "4", "last"),
            accuracy("recall", cells, "1", "all"),
            accuracy("selective copying", cells, "4", "all"),
        ]
        for row, cells, label in LEARNERS
    ]
    return markdown(
        ["", "text, 600 steps", "text, 40 s on a core", "parity", "recall", "copying"],
        rows,
    )


def lengths(axis, label: str) -> None:
    """An axis of tokens, read as 1k, 64k, 1M."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 2**20:.0f}M" if x >= 2**20 else f"{x / 1024:.3g}k")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def memory_lines(axis, load: Load, cases: dict[str, str]) -> None:
    """GiB of a process that trains on one row, over its length; `cases`: of long_sequences.py, and their labels."""
    found = load("long_sequences")["results"]["memory"]
    for case, label in cases.items():
        points = [(int(length), row["mib"] / 1024) for length, row in found[case].items() if "mib" in row]
        ours = COLORS["minGRU"] + ("-" if "chunked" in case else ":")
        style = COLORS["Transformer"] + "--" if "Transformer" in label else ours
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
    lengths(axis, "tokens of the row")
    axis.set(title="training on one row, GiB", ylim=0)
    axis.legend(fontsize=8)


def draw_front(load: Load, path: Path) -> None:
    """Two panels: the time of a token, and the memory of a training step, over the length of what was read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    token, memory = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, float]]] = {}
    for title, rows in load("decoding")["results"].items():
        name, _, rest = title.partition(", a token after ")
        prefix, _, batch = rest.partition(", ")
        if batch == "batch 64" and name in ("minGRU", "LSTM"):
            others = (TRANSFORMER, MAMBA) if name == "minGRU" else ()
            for label, who in ((f"{name}, hf_rnn", "hf_rnn"), *((x, x) for x in others)):
                if "ms" in rows[who]:
                    lines.setdefault(label, []).append((int(prefix), rows[who]["ms"]))
    for label in ("LSTM, hf_rnn", "minGRU, hf_rnn", MAMBA, TRANSFORMER):
        style = COLORS[label.partition(",")[0].partition(" ")[0]] + ("-" if "hf_rnn" in label else "--")
        token.plot(*zip(*lines[label], strict=True), style, marker="o", markersize=4, label=label)
    lengths(token, "tokens read before")
    token.set(title="a token for 64 texts at once, ms", yscale="log")
    token.yaxis.set_major_formatter("{x:g}")
    token.legend(fontsize=8)
    memory_lines(memory, load, {
        "minGRU, chunked": 'minGRU, backprop="chunked"', "minGRU, full": "minGRU, whole rows",
        "Transformer, checkpointing": TRANSFORMER,
    })  # fmt: skip
    figure.savefig(path, dpi=100)


def bars(axis, values: dict[str, float], title: str) -> None:
    colors = ["tab:blue", *["tab:gray"] * (len(values) - 1)]
    found = axis.barh(list(values), list(values.values()), color=colors)
    axis.bar_label(found, [number(value, 2) for value in values.values()], padding=2, fontsize=8)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="times as long as hf_rnn's minGRU")
    axis.margins(x=0.15)


def draw_glance(load: Load, path: Path) -> None:
    """Three panels: bars beside peers for a token and for a training step, memory over length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    token, step, memory = figure.subplots(1, 3)
    decoding = load("decoding")["results"]
    rows, equal = decoding["minGRU, a token after 8192, batch 1"], "minGRU and the same of minGRU-pytorch"
    bars(token, {
        "hf_rnn": 1.0, "minGRU-pytorch": decoding[f"{equal}, a token"]["minGRU-pytorch"]["ratio"],
        "Mamba": rows[MAMBA]["ratio"], "Transformer": rows[TRANSFORMER]["ratio"],
    }, "a token after 8,192")  # fmt: skip
    steps = load("training_step")["results"]["1,000,000 parameters"]
    bars(step, {
        "hf_rnn": 1.0, "minGRU-pytorch,\n8 x 512": steps[equal]["minGRU-pytorch"]["ratio"],
        "Mamba, 64 x 64": steps["minGRU, 64 x 64 tokens"][MAMBA]["ratio"],
        "Transformer,\n64 x 64": steps["minGRU, 64 x 64 tokens"][TRANSFORMER]["ratio"],
        "Transformer,\n1 x 8,192": steps["minGRU, 1 x 8192 tokens"][TRANSFORMER]["ratio"],
    }, "a training step")  # fmt: skip
    memory_lines(memory, load, {"minGRU, chunked": 'backprop="chunked"', "minGRU, full": "whole rows"})
    figure.savefig(path, dpi=100)
