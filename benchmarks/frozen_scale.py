"""What does a forecast from a state lose beside one from the window, whose scale and patches are new each time?

    python benchmarks/frozen_scale.py       # after benchmarks/forecasting.py, whose networks it takes

Synthetic series of every kind (`hf_rnn.tasks.SyntheticSeries`), of whose first 256 values a state takes its scale.
Then the values come 16 at a time, a patch of these networks. At each of some places the next 16 are forecast from the
state and from the last 256 values: the weighted quantile loss of the former over the latter's, all series of a kind
together, and the geometric mean over kinds. "8 more" is half a patch later, when eight values wait for the rest of
theirs.
"""

import numpy as np
import torch
from driver import save
from forecasting import CHECKPOINTS, NETWORKS, QUANTILES
from transformers import AutoModelForTimeSeriesPrediction

from hf_rnn.forecasting.metrics import wql
from hf_rnn.tasks.series import SERIES_KINDS, SyntheticSeries

CONTEXT, HORIZON, SERIES = 256, 16, 20
PLACES = (0, 256, 1024)  # steps behind the first values


def losses(name: str) -> dict[str, dict[str, float]]:
    """Ratio of each kind of series at each place."""
    model = AutoModelForTimeSeriesPrediction.from_pretrained(CHECKPOINTS / f"{name}, seed 0").eval()
    data = SyntheticSeries(CONTEXT + PLACES[-1] + 8 + HORIZON, SERIES * len(SERIES_KINDS), seed=2)
    values = torch.tensor(np.stack([row["values"] for row in data]), dtype=torch.float32)
    kinds = np.array([row["kind"] for row in data])
    found: dict[str, dict[str, float]] = {}
    state, seen = None, 0
    for place in sorted(place + more for place in PLACES for more in (0, 8)):
        state, seen = model.observe(values[:, seen : CONTEXT + place], state), CONTEXT + place
        streamed = model.predict(state, HORIZON).full_predictions.numpy()
        window = model.predict(values[:, place:seen], HORIZON, differencing=False).full_predictions.numpy()
        future = values[:, seen : seen + HORIZON].numpy()
        title = f"{place // 16 * 16} steps" + (", 8 more" if place % 16 else "")
        found[title] = {}
        for kind in SERIES_KINDS:
            rows = kinds == kind
            ratio = [wql(forecast[rows], future[rows], QUANTILES) for forecast in (streamed, window)]
            found[title][kind] = ratio[0] / ratio[1]
    return found


def main() -> None:
    results = {}
    for name in NETWORKS:
        results[name] = losses(name)
        for place, ratios in results[name].items():
            mean = float(np.exp(np.mean(np.log(list(ratios.values())))))
            print(f"{name:8} {place:20} {mean:6.3f}  " + " ".join(f"{k} {r:.2f}" for k, r in ratios.items()))
            ratios["all"] = mean
    save("frozen_scale", results)


if __name__ == "__main__":
    main()
