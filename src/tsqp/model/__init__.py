"""WHAT A MODEL IS, for both sides: its shape, its files, its digest. Weights are public."""
