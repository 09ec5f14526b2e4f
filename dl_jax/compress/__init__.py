"""Smaller models: pruning, weight sharing, quantisation, distillation, a file format, and size and latency."""
