"""Evidence of the platform that the trusted side runs on."""
