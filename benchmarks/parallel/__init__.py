"""Tools and benchmarks of parallel training."""
