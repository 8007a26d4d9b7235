"""Conversations with trained models: the chat in a terminal, and an OpenAI-compatible server."""
