"""An HTTP server in OpenAI's manner, with sessions that keep their state: `hf-rnn serve`."""
