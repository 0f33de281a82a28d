"""Prediction: questions about the next state, what agents answer, and how often they are right."""
