"""`tsqp report`: where the time of a run went."""
