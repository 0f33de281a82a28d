"""The study of grammars: models trained on strings of a grammar, and what they know of it."""
