"""Windows of series and what is held out of them."""

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

import hf_rnn
from hf_rnn.forecasting.metrics import forecast_metrics
from hf_rnn.forecasting.windows import ForecastWindows, pad_past, split_series
from hf_rnn_trainers import RecurrentTrainer, RecurrentTrainingArguments

NAN = float("nan")


def line(start: int, length: int) -> numpy.ndarray:
    """A series whose values say where they stand."""
    return numpy.arange(start, start + length, dtype=float)


def test_windows_are_what_stands_in_the_series():
    series = [line(0, 60), torch.arange(1000.0, 1040.0), line(5000, 21)]
    ends: dict[int, set[int]] = {0: set(), 1000: set(), 5000: set()}
    for row in ForecastWindows(series, context_length=24, prediction_length=8, size=1500, seed=3):
        past, future = row["past_values"], row["future_values"]
        start = next(x for x in (5000, 1000, 0) if past[-1] >= x)
        end = int(past[-1]) - start + 1
        ends[start].add(end)
        assert past.dtype == torch.float32 and len(past) == min(end, 24) and len(future) == 8
        assert torch.equal(torch.cat([past, future[~future.isnan()]]).diff().unique(), torch.ones(1))
    assert ends[0] == set(range(16, 53)) and ends[1000] == set(range(16, 33))  # 8 steps behind each
    assert ends[5000] == {16, 17, 18, 19, 20}  # too short for that: what there is


def test_short_tails_are_missing():
    row = ForecastWindows([line(0, 17)], 32, 8)[5]
    assert row["past_values"].tolist() == list(range(16))
    assert row["future_values"][0] == 16 and row["future_values"][1:].isnan().all()


def test_pasts_and_futures_have_values():
    x = line(0, 200)
    x[30:90] = NAN
    x[120:] = NAN
    for row in ForecastWindows([x], 24, 8, size=300, min_past=10):
        assert (~row["past_values"].isnan()).sum() >= 10 and not row["future_values"].isnan().all()


def test_a_row_is_a_function_of_seed_and_index():
    series = [line(0, 100), line(1000, 50)]
    one, other = (ForecastWindows(series, 16, 4, size=40, seed=seed) for seed in (1, 2))
    rows = [row["future_values"].tolist() for row in one]
    again = DataLoader(
        ForecastWindows(series, 16, 4, size=40, seed=1), batch_size=8, num_workers=2, collate_fn=pad_past
    )
    assert torch.cat([batch["future_values"] for batch in again]).tolist() == rows
    assert [row["future_values"].tolist() for row in other] != rows
    assert torch.equal(one[-1]["past_values"], one[39]["past_values"])
    with pytest.raises(IndexError, match="40 rows, got 40"):
        one[40]


def test_weights():
    series = [line(0, 100), line(1000, 50), line(2000, 50)]
    drawn = [int(row["past_values"][-1]) // 1000 for row in ForecastWindows(series, 16, 4, 2000, weights=[3, 0, 1])]
    assert 0.71 < drawn.count(0) / 2000 < 0.79 and drawn.count(1) == 0


def test_split():
    series = [line(0, 50), line(1000, 31)]
    train, validation, test = split_series(series, horizon=5, validation=2, test=1)
    assert [x.tolist() for x in train] == [list(range(35)), list(range(1000, 1016))]
    held = [(int(row["past_values"][-1]), row["future_values"].tolist()) for row in validation + test]
    starts = [35, 1016, 40, 1021, 45, 1026]  # place by place
    assert held == [(start - 1, list(range(start, start + 5))) for start in starts]
    assert [int(row["past_values"][0]) for row in validation + test] == [0, 1000] * 3
    assert split_series(series, 5, 0, 1).validation == [] and len(split_series(series, 5, 0, 1).train[0]) == 45


def test_batches():
    batch = pad_past([{"past_values": torch.ones(n), "future_values": torch.full((2,), float(n))} for n in (3, 1)])
    assert batch["past_values"].isnan().tolist() == [[False] * 3, [True, True, False]]
    assert batch["future_values"].tolist() == [[3, 3], [1, 1]]


def test_trains_and_is_measured(tmp_path):
    config = hf_rnn.TiRex2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=2, num_attention_heads=2, patch_size=4, context_length=24,
        prediction_length=8, patch_intermediate_size=16, intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    waves = [numpy.sin(numpy.arange(n) / 3 + n) for n in (60, 80)]
    train, validation, _ = split_series(waves, 8)
    trainer = RecurrentTrainer(
        model=hf_rnn.TiRex2ForPrediction(config),
        args=RecurrentTrainingArguments(
            output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2,
            save_strategy="no", label_names=["future_values"], remove_unused_columns=False,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=ForecastWindows(train, 24, 8, size=640),
        eval_dataset=validation,
        data_collator=pad_past,
        compute_metrics=lambda p: forecast_metrics(p.predictions[1], p.label_ids, config.quantiles),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_wql"] < 0.7 * before["eval_wql"] and "eval_coverage_80" in after


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ForecastWindows([], 4, 2), TypeError, "series: expected a list of arrays"),
        (lambda: ForecastWindows([[1.0]], 4, 2), TypeError, r"series\[0\]: expected a tensor .*, got a list"),
        (lambda: ForecastWindows([numpy.ones((2, 9))], 4, 2), ValueError, r"series\[0\]: expected \(T,\), got"),
        (lambda: ForecastWindows([line(0, 9) / 0.0], 4, 2), ValueError, r"series\[0\]: expected finite values"),
        (lambda: ForecastWindows([line(0, 99), line(0, 9)], 24, 2), ValueError, r"series\[1\]: .* 16 values before it"),
        (lambda: ForecastWindows([line(0, 99)], 4, 2), ValueError, "lower min_past"),
        (lambda: ForecastWindows([line(0, 99)], 0, 2), ValueError, "context_length: expected a whole number"),
        (lambda: ForecastWindows([line(0, 99)], 24, 2, weights=[1, 2]), ValueError, "weights: expected 1 numbers"),
        (lambda: ForecastWindows([line(0, 99)], 24, 2, weights=[0]), ValueError, "weights: expected 1 numbers"),
        (lambda: split_series([line(0, 10)], 5), ValueError, r"series\[0\]: expected more than the 10 steps"),
        (lambda: split_series([line(0, 10)], 0), ValueError, "horizon: expected a whole number of at least 1, got 0"),
        (lambda: split_series([line(0, 10)], 1, test=-1), ValueError, "test: expected a whole number of at least 0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with numpy.errstate(all="ignore"), pytest.raises(error, match=message):
        call()
