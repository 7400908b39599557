"""Throughput runs against servers, and the models they use."""
