"""Evaluation: likelihood, ranking and generation of replies, retrieval, visual probes, and their statistics."""
