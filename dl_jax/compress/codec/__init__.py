"""A compressed file format for pruned networks with shared weights; `file` describes it."""

from dl_jax.compress.codec.file import decode, encode

__all__ = ["decode", "encode"]
