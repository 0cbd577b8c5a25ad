"""What docs/performance.md has of forecasts."""

import statistics

from markdown_tables import Results, markdown, mean_and, number


def forecasting(results: Results) -> str:
    models = results["models"]
    groups = next(iter(models.values()))[0]["summary"]
    text = (
        f"Networks after {results['steps']:,} steps of {results['batch']} windows, mean (worst) of 3 seeds, beside "
        "models fitted to each series. ends: the last values of series whose beginnings are in training; unseen: of "
        "other measured series; synthetic: of new ones. Less is better."
    )
    columns = [f"{name} ({row['series']})" for name, row in groups.items()]
    measures = {"mase": "MASE, mean over series", "wql": "WQL over seasonal naive's, geometric mean over series"}
    parts = [text]
    for measure, title in measures.items():
        lines = [
            [name, *(mean_and(max, [row["summary"][group] for row in rows], measure) for group in groups)]
            if len(rows) > 1
            else [name, *(f"{rows[0]['summary'][group][measure]:.3f}" for group in groups)]
            for name, rows in models.items()
        ]
        parts.append(markdown([title, *columns], lines))
    lines = []
    for name, rows in models.items():
        first = rows[0]
        covered = statistics.mean(score["coverage_80"] for row in rows for score in row["scores"].values())
        sizes = [""] * 3
        if "parameters" in first:
            by_differences = f"{sum(row['differencing'] for row in rows)} of {len(rows)}"
            sizes = [f"{first['parameters']:,}", f"{first['learning_rate']:g}", by_differences]
        training = f"{statistics.mean(row['seconds'] for row in rows):.0f}" if "seconds" in first else ""
        forecast = number(statistics.mean(row["forecast_seconds"] for row in rows), 2)
        lines.append([name, *sizes, training, forecast, f"{100 * covered:.0f}%"])
    header = [
        "", "parameters", "learning rate", "trends by differences", "seconds of training", "of forecasting all",
        "in the 80% interval",
    ]  # fmt: skip
    parts.append(markdown(header, lines))
    reasons: dict[str, list[str]] = {}
    for what, reason in results["accepted"].items():
        reasons.setdefault(reason.partition(": ")[2], []).append(f"{what} ({reason.partition(': ')[0]})")
    parts += [f"Better than all networks in {'; '.join(where)}: {reason}." for reason, where in reasons.items()]
    return "\n\n".join(parts)


def forecast_tuning(results: Results) -> str:
    text = (
        "A blood pressure that the checkpoint never saw, 20 windows of 48 values behind those it was tuned on; mean "
        "(worst) of 3 seeds. MASE: 1 is the error of the value before."
    )
    keys = ("wql", "mase", "smape", "coverage_80")
    lines = [["untuned", "", "", "", *(f"{results['untuned'][key]:.3f}" for key in keys), ""]]
    for method, rows in results["tuned"].items():
        first = rows[0]
        cells = [f"{first['trained']:,}", f"{first['learning_rate']:g}", str(results["steps"][method])]
        cells += [mean_and(max, rows, key) for key in keys[:3]] + [mean_and(min, rows, keys[3])]
        lines.append([method, *cells, f"{statistics.mean(row['seconds'] for row in rows):.0f}"])
    header = [
        "",
        "parameters tuned",
        "learning rate",
        "steps",
        "WQL",
        "MASE",
        "sMAPE",
        "in the 80% interval",
        "seconds",
    ]
    return "\n\n".join([text, markdown(header, lines)])


def series_classification(results: Results) -> str:
    parts = [
        "Accuracy on the test rows, mean (worst) of 3 seeds; seconds of fitting and of predicting test rows, behind "
        "a first call."
    ]
    for name, methods in results.items():
        lines = [
            [method, mean_and(min, rows, "accuracy"),
             *(number(statistics.mean(row[key] for row in rows), 2) for key in ("fit_seconds", "predict_seconds"))]
            for method, rows in methods.items()
        ]  # fmt: skip
        parts.append(markdown([name, "accuracy", "seconds of fitting", "of predicting"], lines))
    return "\n\n".join(parts)
