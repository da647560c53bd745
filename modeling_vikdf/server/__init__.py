"""Serving over HTTP, as OpenAI's chat API does, and prompt embeddings for an LLM on vLLM."""

from .app import create_app, prompt_embeddings, serve
from .engine import connect, encode_prompt_embeddings


__all__ = ["connect", "create_app", "encode_prompt_embeddings", "prompt_embeddings", "serve"]
