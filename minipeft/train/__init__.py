"""Training: an optimizer, schedules, batches, a loop and checkpoints. It works on {name: Parameter} and a loss."""
