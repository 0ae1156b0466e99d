"""Benchmarks of seqkernels against torch: see README.md."""
