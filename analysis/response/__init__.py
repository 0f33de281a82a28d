"""Responses: what a weak push on one token changes in every later token, and where induction is seen in it."""
