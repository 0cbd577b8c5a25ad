"""What does a new patch of a series cost, beside forecasting from the whole window again?

    python benchmarks/forecast_streams.py

TiRex-2 at its published size (82.5 million parameters), one series and 16: `observe` a patch of 32 values and `predict`
64 from the state, beside `predict` of the window of 2,048. Then ten thousand series at once with resident states, by
models of a million parameters, a patch of 16 values and a forecast of 16, beside the windows of 512. What a state
takes: by the formula (the states' shapes and what waits) and as counted.
"""

import torch
from driver import compare, table
from models import nearest_width
from resumable import Parts

import hf_rnn
from hf_rnn.forecasting.streaming import ForecastState

CONTEXT, HORIZON = 2048, 64
MANY, PARAMETERS, PATCH, WINDOW = 10_000, 1_000_000, 16, 512
SIZES = dict(patch_size=PATCH, context_length=WINDOW, prediction_length=64, num_hidden_layers=4)
ARCHITECTURES = {
    "minGRU": lambda width: hf_rnn.MinGRUForPrediction(hf_rnn.MinGRUConfig(hidden_size=width, **READS, **SIZES)),
    "LSTM": lambda width: hf_rnn.LSTMForPrediction(hf_rnn.LSTMConfig(hidden_size=width, **READS, **SIZES)),
    "xLSTM": lambda width: hf_rnn.XLSTMForPrediction(hf_rnn.XLSTMConfig(hidden_size=width, **READS, **SIZES)),
    "TiRex-2": lambda width: hf_rnn.TiRex2ForPrediction(
        hf_rnn.TiRex2Config(hidden_size=width, patch_intermediate_size=2 * width, differencing=False, **SIZES)
    ),
}
READS = dict(num_input_features=1)


def state_bytes(state: ForecastState) -> int:
    """Counted."""
    cells = [x for layer in state.cells.states for x in layer]
    return sum(x.numel() * x.element_size() for x in [*cells, state.outputs, state.pending, *state.scaling])


class Streamed:
    """A patch of new values and a forecast, again and again."""

    def __init__(self, model, values: torch.Tensor, horizon: int):
        self.model, self.values, self.horizon = model, values, horizon
        size = model.config.patch_size
        self.state = model.observe(values[:, :-size])
        self.new = values[:, -size:]

    def __call__(self) -> None:
        self.state = self.model.observe(self.new, self.state, horizon=self.horizon)
        self.model.predict(self.state, self.horizon)


def published(rows: int) -> dict:
    torch.manual_seed(0)
    model = hf_rnn.TiRex2ForPrediction(hf_rnn.TiRex2Config(differencing=False)).eval()
    values = torch.randn(rows, CONTEXT).cumsum(1)
    contestants = {
        "a patch and a forecast from the state": Streamed(model, values, HORIZON),
        "the whole window": lambda: model.predict(values, HORIZON) and None,
    }
    return compare(contestants, repeats=20, seconds=60)


def resident(name: str) -> dict:
    torch.manual_seed(0)
    build = ARCHITECTURES[name]
    model = build(nearest_width(build, PARAMETERS, range(32, 513, 16))).eval()
    values = torch.randn(MANY, WINDOW + 4).cumsum(1)[:, 4:]
    streamed = Streamed(model, values, PATCH)
    cells = sum(x[0].numel() for layer in streamed.state.cells.states for x in layer)
    contestants = {
        f"a patch of each of {MANY:,}, and forecasts": streamed,
        "the whole windows": lambda: model.predict(values, PATCH, batch_size=500) and None,
    }
    rows = compare(contestants, repeats=5, seconds=60)
    first = next(iter(rows.values()))
    first["parameters"] = model.num_parameters()
    first["state_bytes"] = state_bytes(streamed.state) / MANY
    first["state_bytes_by_formula"] = 4 * (cells + model.config.hidden_size + 2) + 1  # scaling: 2 numbers and a bool
    return rows


def main() -> None:
    parts, results = Parts("forecast_streams"), {}
    for rows in (1, 16):
        title = f"TiRex-2 of the published size, {rows} series"
        results[title] = parts.run(title, published, rows) or {}
        table(title, results[title])
    for name in ARCHITECTURES:
        title = f"{name} of a million parameters, {MANY:,} series"
        results[title] = parts.run(title, resident, name) or {}
        table(title, results[title])
    parts.finish({title: rows for title, rows in results.items() if rows})


if __name__ == "__main__":
    main()
