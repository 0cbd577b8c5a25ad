"""What every architecture shares: embedding, blocks and norm, heads, config, state, integrity of checkpoint files."""
