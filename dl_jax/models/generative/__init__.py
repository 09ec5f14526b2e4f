"""Networks that generate."""
