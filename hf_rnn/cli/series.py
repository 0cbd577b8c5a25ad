"""Tables of series in files, and models that forecast them, as `hf-rnn forecast` and `hf-rnn train` read them."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForTimeSeriesPrediction, PreTrainedConfig

from hf_rnn import TiRex2ForPrediction
from hf_rnn.forecasting.frames import ID, TIME, VALUE, LongFrame, needed, read_frame
from hf_rnn.forecasting.pictures import Forecast, Panel


class Columns(NamedTuple):
    """What a file calls its columns."""

    id: str = ID
    time: str = TIME
    value: str = VALUE


def read_table(name: str, path: str, columns: Columns = Columns()) -> Any:  # noqa: B008
    """A csv or parquet file as a pandas DataFrame with `ds` and, where there are several series, `unique_id`; `y` and
    others under the names that `hf_rnn.forecasting.frames` knows. Times of a time zone become UTC's.

    Args:
        name: the argument that named it.

    Raises:
        ValueError: there is no such file, or it is of another kind; it has not these columns.
    """
    pandas = needed("pandas")
    read = {".csv": pandas.read_csv, ".parquet": pandas.read_parquet}.get(Path(path).suffix)
    if not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path}")
    if read is None:
        raise ValueError(f"{name}: expected a .csv or .parquet file, got {path}")
    try:
        frame = read(path)
    except ValueError as error:  # pandas' and pyarrow's are
        raise ValueError(f"{name}: {path} cannot be read ({error})") from error
    wanted = [columns.time, *(column for column in columns if column not in Columns())]
    if missing := [column for column in wanted if column not in frame.columns]:
        raise ValueError(f"{name}: expected a column {missing[0]!r}, got {', '.join(map(str, frame.columns))}")
    frame = frame.drop(columns=[name for name in Columns() if name not in columns], errors="ignore")
    frame = frame.rename(columns=dict(zip(columns, Columns(), strict=True)))
    if not pandas.api.types.is_integer_dtype(frame[TIME]):
        try:
            frame[TIME] = pandas.to_datetime(frame[TIME])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {columns.time}: expected times or whole numbers ({error})") from error
        if frame[TIME].dt.tz is not None:
            frame[TIME] = frame[TIME].dt.tz_convert(None)
    return frame


def cut_series(name: str, frame: Any, wanted: list[str] | None = None) -> LongFrame:
    """`read_frame`, whose every error is a ValueError here."""
    try:
        return read_frame(name, frame, wanted)
    except TypeError as error:
        raise ValueError(str(error)) from error


def load_forecaster(checkpoint: str) -> Any:
    """A checkpoint that forecasts, one of the `tirex-2` package as well.

    Raises:
        ValueError: it does something else.
    """
    settings, _ = PreTrainedConfig.get_config_dict(checkpoint)
    if "stack_config" in settings:  # of which transformers knows no model_type
        return TiRex2ForPrediction.from_pretrained(checkpoint)
    head = (settings.get("architectures") or ["a model without a head"])[0]
    if not (head.endswith("ForPrediction") and str(settings.get("model_type")).startswith("hf_rnn_")):
        raise ValueError(f"model: expected a forecaster of hf_rnn, ...ForPrediction, got {head}")
    return AutoModelForTimeSeriesPrediction.from_pretrained(checkpoint)


def panels(read: LongFrame, forecasts: list[list[Forecast]]) -> list[Panel]:
    """Each series with its forecasts, those that have any."""
    found = zip(read.ids, read.times, read.values[VALUE], forecasts, strict=True)
    return [Panel("" if one is None else str(one), t, y, own) for one, t, y, own in found if own]
