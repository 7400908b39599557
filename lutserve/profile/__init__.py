"""Look at a model's numbers before choosing tables for it."""
