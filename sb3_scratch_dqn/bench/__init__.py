"""Benchmarks that anyone can run: ``python -m sb3_scratch_dqn.bench``."""
