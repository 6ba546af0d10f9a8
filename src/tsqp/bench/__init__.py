"""MEASUREMENTS of speed, memory and accuracy. No code that runs a model imports this package."""
