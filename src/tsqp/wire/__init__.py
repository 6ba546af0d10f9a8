"""THE WIRE: messages and memory between the two sides, all visible to an untrusted GPU host."""
