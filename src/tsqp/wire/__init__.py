"""WHAT CROSSES: everything that a hostile GPU host can see or send."""
