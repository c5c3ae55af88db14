"""Evaluation: what an encoder state retrieves, how sure the scores are, and how two of them are compared. Knows nothing of training."""
