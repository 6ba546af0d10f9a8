"""THE TRUSTED SIDE: all code that may see a prompt, an activation or an answer."""
