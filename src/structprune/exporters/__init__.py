"""Output formats. This version writes one: `uniform`, the stock architecture with smaller numbers in its config."""
