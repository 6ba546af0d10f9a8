"""Where a linear layer runs: one file for each privacy mode."""
