"""Measures: the likelihood and rank of replies, replies themselves, retrieval, visual probes, and their statistics."""
