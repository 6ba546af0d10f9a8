"""Threads that wait do not spin: OpenMP reads that before torch is imported."""

import tsqp  # noqa: F401
