"""THE WIRE: everything that a hostile GPU host can see or send."""
