"""Predicts over HTTP with one exported file: `python -m dl_jax.serve FILE`, of the extra `serve`.

`runtime` opens a file, `decode` makes arrays of what a request holds, `batching` calls the file for several requests at
once, `drift` compares what arrives with the validation data, and `app` is the service.
"""
