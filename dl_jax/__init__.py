"""Deep learning experiments in JAX: pure functions from data to a paper's number."""

__version__ = "0.2.0"
