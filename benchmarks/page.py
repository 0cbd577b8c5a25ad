"""docs/performance.md and the two tables of README.md, from the committed results; pictures.py draws what goes with it.

    python benchmarks/page.py        # make performance

Nothing on the page is written by hand but what stands here; a test checks that the page is what this makes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import at_a_glance
from forecast_tables import forecast_tuning, forecasting, series_classification
from markdown_tables import Results, markdown, number
from memory_tables import memory_preset_tasks, memory_presets, memory_sequential
from published import published_rows
from quality_tables import classification, digits_ctc, quality, state_tracking, streams, tagging, weight_bits

HERE = Path(__file__).parent
RESULTS, PAGE, README = HERE / "results", HERE.parent / "docs" / "performance.md", HERE.parent / "README.md"

TITLES = {
    "kernels": "Kernels",
    "recurrent": "LSTM and GRU beside torch's, and with heads",
    "bidirectional": "Both directions",
    "layers": "Norms and convolutions",
    "training_step": "Training steps at equal parameters",
    "layouts": "The gated layout beside the paper's",
    "xlstm": "xLSTM beside transformers' own class",
    "decoding": "Decoding",
    "decoding_sizes": "A token over size and bits",
    "assisted": "Decoding with candidates",
    "states": "States: prompts and files",
    "weight_bits": "Bits a weight and bits a byte",
    "long_sequences": "Training steps of long sequences",
    "streams": "What streams and long gradients teach",
    "decoding_7b": "Decoding at seven billion parameters",
    "min_against_traditional": "Minimal cells against traditional ones",
    "zero_order": "Losses of many perturbed copies",
    "quality": "Quality at equal budget",
    "state_tracking": "State tracking, recall and selective copying",
    "classification": "Expressions and pixels, classified",
    "memory_presets": "Training by memories: presets beside backpropagation through time",
    "memory_preset_tasks": "Training by memories: retrieval and parity",
    "memory_sequential": "Training by memories: evaluations that wait for one another",
    "tagging": "Both directions: sources of Python, tagged",
    "digits_ctc": "Both directions: digits, transcribed and classified",
    "forecasting": "Forecasts beside statsforecast's",
    "forecast_tuning": "A forecaster tuned on a series",
    "series_classification": "Series, classified",
    "forecast_streams": "Series that go on",
}


def load(question: str, device: str = "cpu") -> Results | None:
    path = RESULTS / f"{question}_{device}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(record: Results, question: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = "gpu" if "_gpu" in question else "cpu"
    path = f"../benchmarks/results/{question.removesuffix('_gpu')}_{device}.json"
    return (
        f"By `{record['command']}` on {record['date']}, {record['device']}, commit {record['commit'][:9]}"
        f"{' with changes' if '+' in record['commit'] else ''}, {versions}: [results]({path})."
    )


def tables(results: Results, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Results]]:
    """Every comparison, by where it is."""
    for name, value in results.items():
        if not isinstance(value, dict):
            continue
        if any(isinstance(row, dict) and ("ratio" in row or "refused" in row) for row in value.values()):
            yield ", ".join((*path, name)), value
        else:
            yield from tables(value, (*path, name))


def beside(rows: Results, notes: list[str]) -> str:
    """Every other contestant's time over the first one's."""
    cells = []
    for name, row in list(rows.items())[1:]:
        if "refused" in row:
            cells.append(f"{name}: not timed, {row['refused']}")
            continue
        remark = " (other work)" if row.get("other_work") else ""
        if (row.get("error") or 0) > 1e-4:
            remark = f" (error {row['error']:.0e})"
        if "accepted" in row:
            if row["accepted"] not in notes:
                notes.append(row["accepted"])
            remark += f" [{notes.index(row['accepted']) + 1}]"
        cells.append(f"{name} {row['ratio']:.2f}{remark}")
    return "; ".join(cells)


def generic(results: Results) -> str:
    """A row for every comparison: ours in milliseconds, the others as ratios."""
    notes: list[str] = []
    found = list(tables(results))
    limited = any("share_of_limit" in rows[next(iter(rows))] for _, rows in found)
    header = [
        "what",
        "ms (min to max)",
        *(["share of the limit"] if limited else []),
        "MiB",
        "beside it, times as long",
    ]
    lines = []
    for title, rows in found:
        ours = rows[next(iter(rows))]
        if "refused" in ours:
            lines.append([title, ours["refused"], *([""] if limited else []), "", ""])
            continue
        share = [f"{100 * ours['share_of_limit']:.0f}%" if "share_of_limit" in ours else ""] if limited else []
        spread = f"{number(ours['ms'])} ({number(ours['ms_min'])} to {number(ours['ms_max'])})"
        peak = number(ours["peak_mib"], 2) if "peak_mib" in ours else ""  # older results counted too little
        lines.append([title, spread, *share, peak, beside(rows, notes)])
    return markdown(header, lines) + footnotes(notes)


def footnotes(notes: list[str]) -> str:
    return "".join(f"\n\n[{n}] {note}" for n, note in enumerate(notes, 1))


def kernels(results: Results) -> str:
    limits = results["limits"]
    text = (
        f"A copy moves {limits['bytes_per_second'] / 1e9:.1f} GB/s here, a large matrix product does "
        f"{limits['operations_per_second'] / 1e9:.0f} GFLOP/s; the share is of whichever bounds the op.\n\n"
        "![tokens per second over the length of sequences](pictures/kernels.png)\n\n"
    )
    first = [
        [
            op,
            number(row["nothing compiled"]["ms"] / 1e3),
            number(row["compiled before"]["ms"] / 1e3),
            str(row["compiled before"]["compiled_again"] + row["nothing compiled"]["compiled_again"]),
        ]
        for op, row in results["first call"].items()
    ]
    header = ["first call in a process", "seconds, nothing compiled", "compiled before", "compiled at other T and B"]
    return text + generic(results) + "\n\n" + markdown(header, first)


def by_shape(results: Results, separator: str, value) -> tuple[list[str], dict[str, list[str]]]:
    """Contestants of 'name, shape' tables: columns, and a row for each of ours and of the others."""
    columns: list[str] = []
    lines: dict[str, dict[str, str]] = {}
    for title, rows in results.items():
        name, _, shape = title.partition(separator)
        if not shape:
            continue
        if shape not in columns:
            columns.append(shape)
        for who, row in rows.items():
            lines.setdefault(name if who == "hf_rnn" else who, {})[shape] = value(row)
    ordered = sorted(lines, key=lambda name: "transformers" in name)
    return columns, {name: [lines[name].get(column, "") for column in columns] for name in ordered}


def training_step(results: Results) -> str:
    parts = ["![tokens per second over the length of sequences](pictures/training_step.png)"]
    for size, found in results.items():
        across = {title: rows for title, rows in found.items() if " x " in title}
        parameters = found["parameters"]
        for what, value in (
            ("tokens a second", lambda row: f"{row['tokens_per_second']:,.0f}" if "ms" in row else row["refused"]),
            ("bytes for each token", lambda row: f"{row['bytes_per_token']:,.0f}" if "ms" in row else ""),
        ):
            columns, lines = by_shape(across, ", ", value)
            rows = [[name, f"{parameters[name]:,}", *cells] for name, cells in lines.items()]
            parts.append(f"{size}, {what}:\n\n" + markdown(["", "parameters", *columns], rows))
        parts.append("Times, and how many times as long the others take:\n\n" + generic(found))
    return "\n\n".join(parts)


def decoding(results: Results) -> str:
    parts = ["![milliseconds a token over the prefix](pictures/decoding.png)"]
    tokens = {title: rows for title, rows in results.items() if ", a token after " in title}
    for what, value in (
        ("milliseconds a token", lambda row: number(row["ms"]) if "ms" in row else row["refused"]),
        ("bytes of state, or of keys and values", lambda row: f"{row.get('state_bytes', 0):,}"),
    ):
        columns, lines = by_shape(tokens, ", a token after ", value)
        parts.append(f"{what}, after a prefix:\n\n" + markdown(["", *columns], [[n, *c] for n, c in lines.items()]))
    parts.append("Ratios, `generate()` and the same architectures by others:\n\n" + generic(results))
    return "\n\n".join(parts)


def decoding_sizes(results: Results) -> str:
    parts = ["![milliseconds a token over parameters](pictures/decoding_sizes.png)"]
    tokens = {title: rows for title, rows in results.items() if title != "resident"}
    names = list(dict.fromkeys(name for rows in tokens.values() for name in rows))
    lines = [
        [title, *(number(rows[name]["ms"]) if "ms" in rows.get(name, {}) else "-" for name in names)]
        for title, rows in tokens.items()
    ]
    parts.append("Milliseconds a token, one sequence:\n\n" + markdown(["", *names], lines))
    parts.append("Ratios:\n\n" + generic(tokens))
    if "resident" in results:
        header = ["minGRU, bits", "bytes of the file", "resident beyond those of a small one", "share"]
        rows = [
            [
                bits,
                f"{row['file_bytes']:,}",
                f"{row['resident_bytes']:,}",
                f"{row['resident_bytes'] / row['file_bytes']:.2f}",
            ]
            for bits, row in results["resident"].items()
        ]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def long_sequences(results: Results) -> str:
    lengths = list(dict.fromkeys(length for rows in results["memory"].values() for length in rows))

    def cell(row: Results | None) -> str:
        if row is None:
            return "-"
        return row.get("refused") or f"{row['mib']:,.0f} MiB, {row['us_per_token']:.0f} us"

    text = (
        "The process's memory at its peak, weights, optimizer and libraries included, and time per token, of one "
        "training step of one row of so many tokens; pieces of 1,024. A case is not tried longer once it was refused."
    )
    rows = [[name, *(cell(row.get(length)) for length in lengths)] for name, row in results["memory"].items()]
    header = ["", *(f"{int(length):,}" for length in lengths)]
    parts = [text, markdown(header, rows), "Whole rows and pieces of 1,024 in turn, 8,192 tokens:"]
    speed = [[name, f"{row['full']['ms']:.0f}", f"{row['chunked']['ms']:.0f}", f"{row['chunked']['ratio']:.2f}"]
             for name, row in results["speed"].items()]  # fmt: skip
    return "\n\n".join([*parts, markdown(["", "whole, ms", "chunked, ms", "times as long"], speed)])


WRITERS = {
    "forecasting": forecasting,
    "forecast_tuning": forecast_tuning,
    "series_classification": series_classification,
    "long_sequences": long_sequences,
    "streams": streams,
    "memory_presets": memory_presets,
    "memory_preset_tasks": memory_preset_tasks,
    "memory_sequential": memory_sequential,
    "classification": classification,
    "tagging": tagging,
    "digits_ctc": digits_ctc,
    "kernels": kernels,
    "training_step": training_step,
    "decoding": decoding,
    "decoding_sizes": decoding_sizes,
    "weight_bits": weight_bits,
    "quality": quality,
    "state_tracking": state_tracking,
}


def written(question: str, results: Results) -> str:
    """Tables, and what of them failed or is of another commit."""
    notes = {what: results.pop(what, {}) for what in ("failed", "at_other_commits")}
    lines = [f"Not measured: {part} ({why})." for part, why in notes["failed"].items()]
    lines += [f"At commit {commit[:9]}: {part}." for part, commit in notes["at_other_commits"].items()]
    return "\n\n".join([WRITERS.get(question, generic)(results), *lines])


def faster_peers() -> list[list[str]]:
    """Every row in which a peer is faster than the package."""
    found = []
    for question in TITLES:
        if (record := load(question)) is None:
            continue
        for title, rows in tables(record["results"]):
            for name, row in list(rows.items())[1:]:
                if row.get("ratio", 1) < 1 and not row.get("other_work") and not name.startswith("hf_rnn"):
                    found.append([question, title, name, f"{row['ratio']:.2f}", row.get("accepted", "NOT ACCEPTED")])
    return found


def page() -> str:
    parts = [
        "# Performance",
        "![a token, a training step, memory](pictures/at_a_glance.png)",
        at_a_glance.speed(load),
        "Models of a million parameters in float32 where nothing else is said, on 2 CPU cores; machine, date and "
        "command of each figure stand below, and so does [where a peer is faster](#where-a-peer-is-faster).",
        "What they learn: nats a byte of held-out text, less is better, at 350,000 parameters; then accuracies of two "
        "layers of width 64, more is better: parity of strings four times as long as those of training (a guess gets "
        "0.50), recall of one of 16 pairs, copying symbols from texts four times as long. By `benchmarks/quality.py` "
        "and `benchmarks/state_tracking.py`.",
        at_a_glance.quality(load),
        "## How this was measured\n\nThis page is made by `make performance` from "
        "[benchmarks/results](../benchmarks/results); it is not edited by hand. `make bench` measures again, "
        "`make bench-check` compares ratios with these, `make gpu` measures on a GPU "
        "([how](../CONTRIBUTING.md#on-a-gpu)). Contestants are checked against float64 before they are timed; what is "
        "wrong is not timed, and the row says so. (A decoder is checked with one step after 128 tokens, training steps "
        "of more than 4,096 tokens with 64 tokens, xLSTM's beside transformers' beyond 1,024 against each other; "
        "generate() is not checked against float64, but compiled against plain.) Times are medians of rounds in which "
        "every contestant runs once; ratios are medians over rounds, more than 1 where hf_rnn is faster; MiB are of "
        "tensors at the peak of one call, by the allocator.",
    ]
    for question, title in TITLES.items():
        if (record := load(question)) is not None:
            parts += [f"## {title}\n\n{source(record, question)}", written(question, record["results"])]
        if (gpu := load(question, "gpu")) is not None:
            parts += [f"### {title}, on a GPU\n\n{source(gpu, question + '_gpu')}", written(question, gpu["results"])]
    parts.append(
        "## Published tables, and what we get\n\n"
        + markdown(["published", "theirs", "ours", "by"], published_rows(load))
    )
    rows = faster_peers()
    parts.append(
        "## Where a peer is faster\n\n"
        + (markdown(["question", "what", "peer", "times as long", "accepted because"], rows) if rows else "Nowhere.")
    )
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """README.md with its two tables as they are now, each between its marks."""
    text = README.read_text()
    for name, table in (("speed", at_a_glance.speed(load)), ("quality", at_a_glance.quality(load))):
        start = f"<!-- {name}: made by benchmarks/page.py -->\n"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table}\n{rest[rest.index('<!-- end -->') :]}"
    return text


def main() -> None:
    PAGE.write_text(page())
    README.write_text(readme())
    print(f"wrote {PAGE} and {README}")


if __name__ == "__main__":
    main()
