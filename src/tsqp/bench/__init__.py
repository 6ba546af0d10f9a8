"""MEASUREMENTS, from outside: nothing that runs a model imports this."""
