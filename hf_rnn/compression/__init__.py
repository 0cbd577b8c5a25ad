"""Few bits: coded checkpoints on disk (`save_compressed`), packed weights in memory (`WeightOnlyConfig`)."""
