"""What a supervised worker prints. It has a file of its own: who reads it needs no torch."""

READY = "ready"  # followed by the worker's address, on standard output
