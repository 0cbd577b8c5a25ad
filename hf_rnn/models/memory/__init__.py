"""A memory of tokens, updated by a network without gates: what Supervised Memory Training trains."""
