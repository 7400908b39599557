"""Accuracy runs against a server."""
