"""PURE MATHS: residues, digits, fixed point. No input or output, no secrets, no randomness."""
