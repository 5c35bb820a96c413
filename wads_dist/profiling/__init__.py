"""What kernels and steps cost."""
