"""What docs/performance.md says of what models learn."""

import statistics

from markdown_tables import Results, markdown, mean_and


def quality(results: Results) -> str:
    def cell(runs: list[Results], key: str) -> str:
        values = [run[key] for run in runs]
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    header = [
        "", "parameters", "learning rate", f"loss after {results['steps']} steps",
        f"loss after {results['seconds']:.0f} s", "steps",
    ]  # fmt: skip
    rows = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            cell(row["steps"], "test"),
            cell(row["seconds"], "test"),
            f"{statistics.mean(run['steps'] for run in row['seconds']):,.0f}",
        ]
        for name, row in results["models"].items()
    ]
    text = (
        f"Nats for each byte of the last 5% of {results['data']['name']}, mean (smallest to largest) of 3 seeds, "
        "windows of 128 bytes, 8 in a batch, one thread a run. Mamba runs on mambapy's scan: its "
        "seconds say nothing about its own kernels, which need a GPU.\n\n"
        "![held-out loss](../benchmarks/results/quality_cpu.png)\n\n"
    )
    elsewhere: dict[str, dict[str, None]] = {}
    for unit, budget in (("steps", f"{results['steps']} steps"), ("seconds", f"{results['seconds']:.0f} s")):
        for name, row in results["models"].items():
            for device in {run["device"] for run in row[unit] if "device" in run}:
                elsewhere.setdefault(f"{budget} on {device}", {})[name] = None
    notes = [f"The runs of {what}: those of {'; '.join(names)}." for what, names in elsewhere.items()]
    sizes = markdown(
        [f"loss after {results['steps']} steps, one seed", "parameters", "learning rate", "loss"],
        [
            [
                name,
                f"{row['parameters']:,}",
                f"{row['learning_rate']:.2g}",
                f"{row['test']:.3f}",
            ]
            for rows in results["sizes"].values()
            for name, row in rows.items()
        ],
    )
    return "\n\n".join([text + markdown(header, rows), *notes, sizes])


def state_tracking(results: Results) -> str:
    parts = [
        "Accuracy on new strings, mean (worst) of 3 seeds, of Mamba one; data, steps and schedule the same for all, "
        "the learning rate the better of two after half of the steps, Mamba's 0.01. Guessing is right in 0.5 of "
        "parities, 0.125 of copied symbols.",
        "![accuracy over length](../benchmarks/results/state_tracking.png)",
    ]
    for task, rows in results.items():
        factors = [
            factor for factor in ("1", "2", "4", "16") if factor in next(iter(rows.values()))["runs"][0]["accuracy"]
        ]
        key = "last" if task == "parity" else "all"

        def cell(row: Results, factor: str, key: str = key) -> str:
            values = [run["accuracy"][factor][key] for run in row["runs"] if factor in run["accuracy"]]
            return f"{statistics.mean(values):.2f} ({min(values):.2f})" if values else "-"

        lines = [
            [name, f"{row['parameters']:,}", f"{row['runs'][0]['learning_rate']:g}", *(cell(row, f) for f in factors)]
            for name, row in rows.items()
        ]
        sizes = [f"{factor} times the size of training" for factor in factors]
        header = [f"{task}: cells", "parameters", "learning rate", *sizes]
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def weight_bits(results: Results) -> str:
    kinds = [kind for kind, found in next(iter(results["models"].values())).items() if isinstance(found, dict)]
    lines = [
        [name, *(f"{row[kind]['bits_per_byte']:.4f} ({row[kind]['bits_per_weight']:.1f})" for kind in kinds)]
        for name, row in results["models"].items()
    ]
    text = (
        f"Models of 350,000 parameters after {results['steps']} steps, seed 0: bits per byte of held-out text, and in "
        "parentheses bits a parameter, in memory, of the coded ones on disk. Embeddings are float32 but in coded ones."
    )
    return text + "\n\n" + markdown(["", *kinds], lines)


def classification(results: Results) -> str:
    parts = [
        "Accuracy on others than were trained on, mean (worst) of 3 seeds. ListOps by Long Range Arena's rules, 20 to "
        "100 tokens; digits of 64 pixels, one by one. Guessing is right in about 0.17 and 0.1."
    ]
    for task, rows in results.items():
        lines = []
        for name, row in rows.items():
            values = [run["accuracy"] for run in row["runs"]]
            seconds = statistics.mean(run["seconds"] for run in row["runs"])
            cell = f"{statistics.mean(values):.3f} ({min(values):.3f})"
            lines.append(
                [name, f"{row['parameters']:,}", f"{row['runs'][0]['learning_rate']:g}", cell, f"{seconds:.0f}"]
            )
        parts.append(markdown([task, "parameters", "learning rate", "accuracy", "seconds"], lines))
    return "\n\n".join(parts)


def tagging(results: Results) -> str:
    text = (
        f"After {results['steps']} steps of 8 windows of 256 bytes: of bytes of files not trained on, accuracy and the "
        "mean of the labels' F1, mean (worst) of 3 seeds. Transformers: Llama's blocks in one direction, ModernBERT's "
        "in both."
    )
    rows, labels = [], []
    for name, directions in results["models"].items():
        for direction, runs in directions.items():
            first, seconds = runs[0], statistics.mean(run["seconds"] for run in runs)
            sizes = [str(first["width"]), f"{first['parameters']:,}", f"{first['learning_rate']:g}"]
            scores = [mean_and(min, runs, key) for key in ("accuracy", "macro_f1")]
            rows.append([f"{name}, {direction}", *sizes, *scores, f"{seconds:.0f}"])
            means = [statistics.mean(run["f1"][label] for run in runs) for label in first["f1"]]
            labels.append([f"{name}, {direction}", *(f"{mean:.3f}" for mean in means)])
    header = ["", "width", "parameters", "learning rate", "accuracy", "mean F1", "seconds"]
    each = markdown(["F1", *first["f1"]], labels)
    picture = "![a file, and what a model takes it for](../benchmarks/results/tagging_cpu.png)"
    return "\n\n".join([text, markdown(header, rows), each, picture])


def digits_ctc(results: Results) -> str:
    parts = [
        "Images not trained on, mean (worst) of 3 seeds. strings: five digits, edits over the length; rows: one digit, "
        "the share that is wrong."
    ]
    for task, models in results.items():
        rows = [
            [
                f"{name}, {direction}",
                str(runs[0]["width"]),
                f"{runs[0]['parameters']:,}",
                mean_and(max, runs, "error"),
            ]
            for name, directions in models.items()
            for direction, runs in directions.items()
        ]
        parts.append(markdown([task, "width", "parameters", "errors"], rows))
    return "\n\n".join(parts)


def streams(results: Results) -> str:
    text = (
        "8,192 tokens a step, 300 steps. windows: of 128 tokens, each from an empty state; truncated: streams whose "
        "state goes on over 128 tokens a step, without its gradient; exact: streams with the gradient of 2,048. Bits "
        "per byte of held-out text, mean (range) of 3 seeds: as one stream, of bytes more than 128 after the start of "
        "one of four parts, and of windows of 128."
    )
    lines = []
    for name, layouts in results["text"].items():
        for layout, runs in layouts.items():
            cells = []
            for key in ("stream", "beyond", "windows"):
                values = [run[key] for run in runs]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append([f"{name}, {layout}", *cells])
    parts = [text, markdown(["", "one stream", "beyond 128", "windows"], lines)]
    parts.append("Retrieval, accuracy of each seed (guessing: 0.125), the answer at least so many tokens back:")
    distances = list(next(iter(results["retrieval"].values()))["exact"])
    lines = [
        [f"{name}, {layout}", *(" ".join(f"{run['accuracy']:.2f}" for run in row.get(d, [])) or "-" for d in distances)]
        for name, layouts in results["retrieval"].items()
        for layout, row in layouts.items()
    ]
    return "\n\n".join([*parts, markdown(["", *distances], lines)])
