"""MEASUREMENTS, from outside: nothing else imports this."""
