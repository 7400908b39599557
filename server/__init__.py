"""Starting and guarding vLLM's OpenAI-compatible server."""
