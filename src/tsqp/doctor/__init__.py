"""`tsqp doctor`: what is wrong, in ten seconds."""
