"""What one process does with a finished model: load it, generate text, measure it."""
