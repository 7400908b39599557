"""Formats compared: their shapes and errors, published accuracy, and what a MAC unit of each costs."""
