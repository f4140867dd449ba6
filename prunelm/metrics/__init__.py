"""Perplexity, word error rate, operations and measured time."""
