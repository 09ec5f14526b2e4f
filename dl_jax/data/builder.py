"""Writes examples as a prepared TFDS set, without TensorFlow."""

import contextlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Example = Mapping[str, Any]
Key = int | str


def write(
    root: Path,
    name: str,
    version: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[tuple[Key, Example]]],
    **described: Any,
) -> None:
    """Prepares the set `name` in the data folder `root`, in array_record format.

    Args:
        root: The data folder.
        name: The set's name, or name/config.
        version: Three numbers, such as 1.0.0.
        features: TFDS's features, by name.
        splits: The examples of each split with their keys. TFDS stores them in the order of the keys' digests.
        described: What else TFDS's `DatasetInfo` takes, such as `description`.
    """
    import tensorflow_datasets as tfds

    set_name, _, config = name.partition("/")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(features)), **described)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from examples

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download on stdout, though it makes none
            Builder(data_dir=root, config=config or None, file_format="array_record").download_and_prepare()
    finally:
        tfds.enable_progress_bar()
