"""Series of numbers, as forecasting models read them and say what comes next."""
