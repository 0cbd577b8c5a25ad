"""The pictures of the documentation, from the committed results.

python benchmarks/pictures.py        # make performance
"""

import at_a_glance
from page import HERE, load, tables

PICTURES = HERE.parent / "docs" / "pictures"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    PICTURES.mkdir(exist_ok=True)
    at_a_glance.draw_front(load, PICTURES / "front.png")
    at_a_glance.draw_glance(load, PICTURES / "at_a_glance.png")

    def draw(name: str, curves: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str) -> None:
        """One panel for each entry of `curves`: label to points."""
        figure = Figure(figsize=(5 * len(curves) + 2, 4), layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        for axis, (title, lines) in zip(axes, curves.items(), strict=True):
            for label, points in lines.items():
                style = "--" if "transformers" in label or "-pytorch" in label or "torch." in label else "-"
                axis.plot(*zip(*sorted(points), strict=True), style, marker=".", label=label)
            axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=8)
        figure.savefig(PICTURES / f"{name}.png", dpi=90)

    if record := load("kernels"):
        curves: dict[str, dict] = {"forward": {}, "forward + backward": {}}
        for title, rows in tables(record["results"]):
            head, _, shape = title.rpartition(", ")
            batch, _, time = shape.partition(" x ")
            if int(batch) * int(time) != 65536:
                continue
            what = "forward + backward" if "backward" in head else "forward"
            op = head.removesuffix(what).strip()
            point = (int(time), 65536 / rows["hf_rnn"]["ms"] * 1e3)
            curves[what].setdefault(op, []).append(point)
        draw("kernels", curves, "T, 65,536 tokens in all", "tokens a second")
    if record := load("training_step"):
        curves = {}
        for size, found in record["results"].items():
            lines: dict[str, list] = {}
            for title, rows in found.items():
                if " x " not in title:
                    continue
                name, _, shape = title.partition(", ")
                time = int(shape.removesuffix(" tokens").partition(" x ")[2])
                for who, row in rows.items():
                    if "ms" in row and (who == "hf_rnn" or name == "LSTM"):
                        lines.setdefault(name if who == "hf_rnn" else who, []).append((time, row["tokens_per_second"]))
            curves[size] = lines
        draw("training_step", curves, "T", "tokens a second")
    if record := load("decoding"):
        curves = {"batch 1": {}, "batch 64": {}}
        for title, rows in record["results"].items():
            name, _, rest = title.partition(", a token after ")
            if not rest:
                continue
            prefix, _, batch = rest.partition(", ")
            for who, row in rows.items():
                if "ms" in row and (who == "hf_rnn" or name == "LSTM"):
                    curves[batch].setdefault(name if who == "hf_rnn" else who, []).append((int(prefix), row["ms"]))
        draw("decoding", curves, "tokens before", "ms a token")
    if record := load("long_sequences"):
        curves = {}
        for case, rows in record["results"]["memory"].items():
            name, _, how = case.partition(", ")
            points = [(int(length), row["mib"]) for length, row in rows.items() if "mib" in row]
            for panel in ("minGRU", "LSTM") if name == "Transformer" else (name,):
                curves.setdefault(panel, {})[case if name == "Transformer" else how] = points
        draw("long_sequences", curves, "tokens of a training step", "MiB of the process")
    if record := load("decoding_sizes"):
        lines = {}
        for title, rows in record["results"].items():
            name, _, size = title.partition(", ")
            if name != "minGRU":
                continue
            for who, row in rows.items():
                if "ms" in row:
                    label = who.replace("hf_rnn", "minGRU, hf_rnn")
                    lines.setdefault(label, []).append((int(size.split()[0].replace(",", "")), row["ms"]))
        draw("decoding_sizes", {"one sequence": lines}, "parameters", "ms a token")


if __name__ == "__main__":
    main()
