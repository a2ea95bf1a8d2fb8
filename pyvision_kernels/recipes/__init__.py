"""Runnable recipes: `python -m pyvision_kernels.recipes.<name>`."""
