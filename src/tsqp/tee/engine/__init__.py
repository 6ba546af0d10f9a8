"""Requests, steps and batches: `Scheduler` chooses, `Engine` runs, `Observer` measures."""
