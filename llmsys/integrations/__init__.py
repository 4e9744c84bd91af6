"""Other libraries' interfaces on these kernels."""
