"""Attacks on what a worker received."""
