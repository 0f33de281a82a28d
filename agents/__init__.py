"""Who predicts: language models, reference agents, people; rollouts and training."""
