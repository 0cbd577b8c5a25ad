"""The code that goes with a checkpoint, so that `trust_remote_code=True` loads it."""
