"""Layered context-free grammars: notation, sources, sizes, labelled samples, and exact computations on strings."""
