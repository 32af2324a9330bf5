"""Training: an optimizer, schedules, batches, a loop, and checkpoints. It sees dicts of parameters and a loss."""
