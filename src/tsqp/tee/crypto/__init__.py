"""THE TRUSTED SIDE'S SECRETS: randomness, pads, check vectors, and the loops that touch them."""
