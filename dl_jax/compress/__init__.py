"""Smaller models: pruned, quantised, distilled, encoded, and measured for what they are."""
