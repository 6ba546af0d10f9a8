"""`tsqp doctor`: finds what is wrong with this machine or a worker, in about ten seconds."""
