"""Training: the step, the epoch, optimizer, checkpoints, resume and signals."""
