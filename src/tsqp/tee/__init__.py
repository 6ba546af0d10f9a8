"""THE TRUSTED SIDE: everything that may see a prompt, an activation or an answer."""
