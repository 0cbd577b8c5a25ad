"""Tables of series in files, as `hf-rnn forecast` and `hf-rnn train --task forecasting` read them."""

from pathlib import Path
from typing import Any

from hf_rnn.forecasting.frames import ID, TIME, VALUE, read_frame


def read_table(
    name: str, path: str, columns: tuple[str, str, str] = (ID, TIME, VALUE), needs_value: bool = True
) -> Any:
    """A pandas frame in the long format: a row for each `unique_id` and time `ds`, the value in `y`.

    Args:
        name: what is told of it in errors.
        path: a csv or parquet file.
        columns: what `unique_id`, `ds` and `y` are called there; a file of one series has no first one.
        needs_value: expect a `y`.

    Raises:
        ValueError: no such file, of another kind, without such columns, times that are none.
    """
    import pandas

    kind = Path(path).suffix
    if kind not in (".csv", ".parquet"):
        raise ValueError(f"{name}: expected a .csv or .parquet file, got {path}")
    if not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path}")
    try:
        frame = pandas.read_csv(path) if kind == ".csv" else pandas.read_parquet(path)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {path} is no table ({error})") from error
    for wanted in columns[1:] if needs_value else columns[1:2]:
        if wanted not in frame.columns:
            raise ValueError(
                f"{name}: expected a column {wanted!r} in {path}, got {', '.join(map(str, frame.columns))}"
            )
    frame = frame.rename(columns=dict(zip(columns, (ID, TIME, VALUE), strict=True)))
    if not pandas.api.types.is_numeric_dtype(frame[TIME]):
        try:
            frame[TIME] = pandas.to_datetime(frame[TIME])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {columns[1]}: expected times or whole numbers in {path} ({error})") from error
    return frame


def read_series_of(name: str, path: str) -> tuple[list[Any], list[Any]]:
    """The ids and the values (T,) of a file's series."""
    try:
        found = read_frame(name, read_table(name, path), [VALUE])
    except TypeError as error:  # a column of another type, in a file that a user gave
        raise ValueError(str(error)) from error
    return found.ids, found.values[VALUE]
