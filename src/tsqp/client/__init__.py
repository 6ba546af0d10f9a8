"""The relying party: talks to a server, after verifying it."""
