"""THE WORKER: assume it hostile. It holds public weights and no secret."""
