"""What docs/performance.md says of training by memories."""

import statistics

from markdown_tables import Results, markdown, number

METHODS = {"bptt": "through time", "bptt 64": "through time, 16 rows of 64", "dense": "`dense` preset, k = {}"}
METHODS |= {"alone": "without a teacher, k = {}", "truncated": '`backprop="truncated"`, {} tokens'}
METHODS |= {"rare": "`rare` preset", "transformer": "a transformer of as many parameters"}
PARTS = {
    "text": "Text, 16 rows of 64, 250 steps",
    "long": "Text, 4 rows of 256, as many CPU seconds as the `dense` preset's 250 steps",
    "longer": "Text, one row of 1,024, as many CPU seconds as the `dense` preset's 250 steps",
    "lstm": "The same text as rows of 64, an LSTM of 256 units",
    "gru": "The same, a GRU of 256 units",
    "pixels": "Digits, 64 pixels of 8 grey levels, 250 steps of 16",
}


def method(name: str) -> str:
    kind, _, k = name.partition(":")
    return METHODS[kind].format(k)


def spread(values: list[float], places: int) -> str:
    """The mean, and the range of several."""
    mean = f"{statistics.mean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{places}f} to {max(values):.{places}f})"


def memory_presets(results: Results) -> str:
    """A table of each part that was run."""
    text = [
        "A memory of 4 x 64 with the MLP updater, where nothing else is said. Nats per token of held-out rows from the "
        "empty memory, mean (range) over seeds; CPU seconds of training, of the process. SMT takes 200 of the steps, "
        "DMT 50. The machine was shared and busy, which CPU seconds feel as well, so that steps of `long` were counted "
        "by the least of several."
    ]
    for part, title in PARTS.items():
        rows = results.get(part, [])
        if not rows:
            continue
        lines = []
        for name, rate in dict.fromkeys((row["run"], row["rate"]) for row in rows):
            runs = [row for row in rows if (row["run"], row["rate"]) == (name, rate)]
            steps = " + ".join(f"{n:,}" for n in runs[0]["steps"] if n)
            if not name.startswith("dense"):
                steps = f"{sum(runs[0]['steps']):,}"
            measured = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
            seconds = number(statistics.mean(measured), 2) if measured else ""
            lines.append(
                [method(name), f"{rate:g}", steps, str(len(runs)), spread([r["loss"] for r in runs], 3), seconds]
            )
        text += [f"{title}:", markdown(["", "learning rate", "steps", "seeds", "nats", "CPU s"], lines)]
    if "seconds" in results:
        text.append("Least CPU milliseconds of a step, of SMT and of DMT where there are both:")
        lines = [
            [
                PARTS[part].split(", ")[1],
                method(name),
                ", ".join(f"{ms:.0f}" for ms in found),
            ]
            for part, times in results["seconds"].items()
            for name, found in times.items()
        ]
        text.append(markdown(["rows", "", "ms"], lines))
    return "\n\n".join(text)


def memory_preset_tasks(results: Results) -> str:
    """Accuracy over lengths."""
    length, lines = results["length"], []
    for task, name in dict.fromkeys((row["task"], row["run"]) for row in results["rows"]):
        runs = [row for row in results["rows"] if (row["task"], row["run"]) == (task, name)]
        cells = [spread([run["accuracy"][n] for run in runs], 2) for n in range(3)]
        steps = " + ".join(str(n) for n in runs[0]["steps"])
        seconds = number(statistics.mean(run["cpu_seconds"] for run in runs), 2)
        lines.append([task, method(name), f"{runs[0]['chance']:g}", steps, str(len(runs)), *cells, seconds])
    header = ["task", "", "chance", "steps", "seeds", *(f"{n * length} tokens" for n in (1, 2, 4)), "CPU s"]
    return f"Trained on rows of {length} tokens, 64 a step.\n\n" + markdown(header, lines)


def memory_sequential(results: Results) -> str:
    """Ends of the curves."""
    lines = []
    for row in results["rows"]:
        end, norms = row["curve"][-1], [norm for _, norm in row["norms"]]
        cells = [f"{end['sequential']:,}", f"{end['loss']:.3f}", number(end["cpu"], 2)]
        lines.append(
            [
                method(row["run"]),
                *cells,
                number(statistics.median(norms), 2),
                ", ".join(number(x, 2) for x in row["mib"]),
            ]
        )
    text = (
        "Text, rows of 64, seed 0: evaluations of the student that wait for one another in forward passes, the loss "
        "they end at, norms of its gradients, MiB of tensors at the peak of a step, of SMT and of DMT where there are "
        "both.\n\n![loss over sequential evaluations](../benchmarks/results/memory_sequential_cpu.png)\n\n"
    )
    return text + markdown(["", "evaluations", "nats", "CPU s", "median norm", "MiB"], lines)
