"""Benchmarks. Without this file an installed package of the same name, such as that of Opacus, would hide them."""
