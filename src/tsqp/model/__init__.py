"""MODEL DESCRIPTIONS, for both sides: config, families and rotary parameters. All are public."""
