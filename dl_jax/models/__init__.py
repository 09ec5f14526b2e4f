"""The model zoo: Flax Linen modules, one architecture per file.

Every classifier is called as `module.apply(variables, image, train=False)` with image [B, H, W, C], intensities in
[0, 1], and gives float32 logits [B, classes]. Parameters are float32; `dtype` is the type that it computes in. Every
file ends with `examples()`: tiny instances with a batch each, which tests/zoo/test_models.py puts through its checks.
"""
