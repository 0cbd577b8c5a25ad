"""MinLSTM."""
