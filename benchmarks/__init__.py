"""Throughput of the kernels against PyTorch's ecosystem: `python -m benchmarks`."""
