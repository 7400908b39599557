"""Linear methods for vLLM, one file a family; `lutserve.methods` is their registry."""
