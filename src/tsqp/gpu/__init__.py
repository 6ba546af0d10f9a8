"""THE WORKER, which is assumed to be hostile. It holds public weights and no secrets."""
