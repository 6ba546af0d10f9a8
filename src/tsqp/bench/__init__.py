"""MEASUREMENTS, from outside: only the command line imports this."""
