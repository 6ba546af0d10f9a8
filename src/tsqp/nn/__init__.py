"""The forward mathematics of both sides."""
