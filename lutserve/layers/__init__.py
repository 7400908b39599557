"""Layers of vLLM with our arithmetic inside."""
