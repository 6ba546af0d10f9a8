"""Where a linear layer runs: one file a privacy mode."""
