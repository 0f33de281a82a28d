"""Agents: language models, reference agents and people; rollouts and training."""
