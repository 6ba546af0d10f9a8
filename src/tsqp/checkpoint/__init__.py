"""Files: checkpoints, integer weights, digests."""
