"""Checkpoints in few bits: `save_compressed` writes them, `from_pretrained` reads them."""
