"""Serving over HTTP, as OpenAI's chat API does, and prompt embeddings for an LLM on vLLM."""

from .app import create_app, encode_prompt_embeddings, prompt_embeddings, serve


__all__ = ["create_app", "encode_prompt_embeddings", "prompt_embeddings", "serve"]
