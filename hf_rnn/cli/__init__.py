"""The `hf-rnn` command."""
