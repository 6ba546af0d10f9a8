"""Answers that follow a schema or a grammar: which tokens may come next, through llguidance."""
