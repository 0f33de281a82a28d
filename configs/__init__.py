"""Experiments as YAML, one file a question somebody would ask."""
