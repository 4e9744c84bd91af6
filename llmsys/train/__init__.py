"""Training: config, step, loop, checkpoints, and the comparison with stock PyTorch."""
