"""Loads prepared TFDS sets as columns, and batches them in an order that is a pure function of (seed, step).

records = data.load("mnist", "train[:90%]")         # {"image": uint8 [N, 28, 28, 1], "label": int32 [N]}
stream = data.shuffled(records, batch_size=128, seeds=(0, 1))
stream(7)                                            # the batch of step 7, [2, 128, ...], the same in every call

This package never imports JAX.
"""

from dl_jax.core.ragged import Ragged, joined, ragged
from dl_jax.core.stream import Columns, Stream, epoch
from dl_jax.data import text
from dl_jax.data.batches import few, per_seed, rows, shuffled
from dl_jax.data.buckets import bucketed, buckets, widths
from dl_jax.data.columns import check_columns, load
from dl_jax.data.describe import Feature, Info, info
from dl_jax.data.image import check_images, check_labels, check_two_classes, enlarge, grey_images, images, resized_crop
from dl_jax.data.objects import objects, padded_objects, scenes, with_area
from dl_jax.data.poisson import capacity_for, overflow, poisson
from dl_jax.data.streaming import streamed
from dl_jax.data.tabular import Regression, held_out, moments, regression

__all__ = [
    "Columns",
    "Feature",
    "Info",
    "Ragged",
    "Regression",
    "Stream",
    "bucketed",
    "buckets",
    "capacity_for",
    "check_columns",
    "check_images",
    "check_labels",
    "check_two_classes",
    "enlarge",
    "epoch",
    "few",
    "grey_images",
    "held_out",
    "images",
    "info",
    "joined",
    "load",
    "moments",
    "objects",
    "overflow",
    "padded_objects",
    "per_seed",
    "poisson",
    "ragged",
    "regression",
    "resized_crop",
    "rows",
    "scenes",
    "shuffled",
    "streamed",
    "text",
    "widths",
    "with_area",
]
