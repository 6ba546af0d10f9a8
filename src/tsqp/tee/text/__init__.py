"""Text to token ids and back: vocabularies from files, streamed text, stop strings."""
