"""Networks as files of their own: see `file`."""

from dl_jax.compress.codec.file import decode, encode

__all__ = ["decode", "encode"]
