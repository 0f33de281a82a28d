"""Layered context-free grammars: notation, sources, sizes, samples with labels, and what is exactly so of a string."""
