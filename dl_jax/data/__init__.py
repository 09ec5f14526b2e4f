"""Data: a prepared TFDS set as columns, batched in an order that is a pure function of (seed, step). Never imports JAX.

records = data.load("mnist", "train[:90%]")         # {"image": uint8 [N, 28, 28, 1], "label": int32 [N]}
stream = data.batches(records, batch_size=128, seed=0)
stream(7)                                            # the batch of step 7, the same at any time and on any host
"""

from dl_jax.data import text
from dl_jax.data.batches import Columns, Stream, batches, epoch, later, per_seed, windows
from dl_jax.data.columns import load
from dl_jax.data.describe import Feature, Info, info
from dl_jax.data.image import check_images, check_labels, enlarge, grey_pictures
from dl_jax.data.streaming import stream

__all__ = [
    "Columns",
    "Feature",
    "Info",
    "Stream",
    "batches",
    "check_images",
    "check_labels",
    "enlarge",
    "epoch",
    "grey_pictures",
    "info",
    "later",
    "load",
    "per_seed",
    "stream",
    "text",
    "windows",
]
