"""The model zoo: Flax Linen modules, one architecture per file.

A classifier is called as `module.apply(variables, image, train=False)` with image [B, H, W, C], intensities in [0, 1],
and returns float32 logits [B, classes]. Parameters are float32; `dtype` is the type of the computation. Every file in
a subfolder ends with two functions. `examples()` returns small instances with a batch of inputs each, which
tests/zoo/test_models.py tests. `published()` returns full-size instances, each with the shapes of its inputs and the
number of parameters that its paper or a reference implementation gives; `python -m dl_jax.models` lists them.
"""
