"""What a host's processor gives a network of images: streams of JPEGs, and augmentations.

    python benchmarks/input.py            five minutes on one quiet core
    python benchmarks/input.py --quick    to see that it runs

It writes a set of generated images of ImageNet's size (about 500x375 pixels, smooth, quality 90) to a temporary folder,
streams it with `data.streamed` and `data.resized_crop(224)`, and divides the images by the seconds of processor time of
the whole process, threads included: images/s per core. Augmentations are timed on the CPU in the same way; on an
accelerator they are part of the step. The number of cores that a host needs for a chip is the chip's images/s divided
by the stream's images/s per core.
"""

import argparse
import contextlib
import functools
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from dl_jax import data
from dl_jax.data.image import scaled_centre
from dl_jax.harness.machine import git_state, processor, versions

SIZE, BATCH = 224, 64


def prepare(folder: str, n: int) -> None:
    """The TFDS set `smooth` of `n` images."""
    import PIL.Image
    import tensorflow_datasets as tfds

    def jpeg(rng: np.random.Generator) -> bytes:
        height, width = (round(side) for side in rng.normal((375, 500), 20))
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        fine = rng.normal(0, 8, (height, width, 3))
        image = np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)) + fine
        file = io.BytesIO()
        PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()

    class Smooth(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "smooth"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=1000),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rng = np.random.default_rng(0)
            for i in range(n):
                yield i, {"image": jpeg(rng), "label": i % 1000}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download on stdout, though there is none
        Smooth(data_dir=folder, file_format="array_record").download_and_prepare()


def per_core(work: Callable[[int], Any], images: int, calls: int) -> float:
    """The median number of images per second of processor time of `calls` calls of `work`, after one more."""
    work(0)
    rates = []
    for call in range(1, calls + 1):
        began = time.process_time()
        work(call)
        rates.append(images / (time.process_time() - began))
    return float(np.median(rates))


def streams(folder: str, calls: int) -> dict[str, float]:
    """Images/s per core by what is done to the JPEGs."""
    transforms: dict[str, Any] = {
        "decoded, random window resized to 224 (train)": data.resized_crop(SIZE),
        "decoded, scaled to 224, centre cropped (evaluation)": lambda rng, example: {
            "image": scaled_centre(example["image"], SIZE)
        },
        "decoded only": lambda rng, example: {"label": example["label"]},
    }
    stream = functools.partial(data.streamed, "smooth", "train", BATCH, 0, data_dir=folder, cache_dir=folder, threads=1)
    return {name: per_core(stream(transform=each), BATCH, calls) for name, each in transforms.items()}


def augmentations(calls: int) -> dict[str, tuple[float, float]]:
    """Images/s per core of each augmentation, for 128 images of 32x32 and for 16 of 224x224."""
    import jax

    from dl_jax import augment

    each: dict[str, Callable[[int], augment.Augmentation]] = {
        "flip": lambda size: augment.flip(),
        "pad_and_crop": lambda size: augment.pad_and_crop(4),
        "affine": lambda size: augment.affine(degrees=(-15, 15)),
        "resized_crop": augment.resized_crop,
        "elastic": lambda size: augment.elastic(34, 4),
        "barrel": lambda size: augment.barrel((-0.2, 0.3)),
        "colour_jitter": lambda size: augment.colour_jitter(
            brightness_factor=(0.6, 1.4),
            contrast_factor=(0.6, 1.4),
            saturation_factor=(0.6, 1.4),
            hue_turns=(-0.1, 0.1),
        ),
        "noise": lambda size: augment.noise(0.1),
        "cutout": lambda size: augment.cutout(16),
        "mixup": lambda size: augment.mixup(1, 10),
        "cutmix": lambda size: augment.cutmix(1, 10),
        "rand_augment": lambda size: augment.rand_augment(),
    }
    rates: dict[str, list[float]] = {name: [] for name in each}
    for n, size in ((128, 32), (16, SIZE)):
        images = np.random.default_rng(0).random((n, size, size, 3), np.float32)
        arguments = jax.device_put((jax.random.key(0), {"image": images, "label": np.arange(n) % 10}))
        for name, make in each.items():
            run = functools.partial(jax.jit(make(size)), *arguments)
            rates[name].append(per_core(lambda call, run=run: jax.block_until_ready(run()), n, calls))
    return {name: (small, large) for name, (small, large) in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images")
    quick = parser.parse_args().quick
    n, calls = (64, 2) if quick else (400, 10)
    code, used = git_state(Path(__file__).parent), versions()
    print(f"{processor()}; {', '.join(f'{name} {version}' for name, version in used.items())}")
    print(f"commit {code['commit'][:12]}{'' if code['clean'] else ' with uncommitted changes'}\n")
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, n)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*array_record*")) / n
        print(f"JPEGs of about 500x375 pixels, {size / 1000:.0f} kB each, from array_record: images/s per core")
        for name, rate in streams(folder, calls).items():
            print(f"  {name:<56}{rate:8,.0f}")
    print("\nAugmentations on the CPU: images/s per core             32x32x3  224x224x3")
    for name, (small, large) in augmentations(calls).items():
        print(f"  {name:<52}{small:10,.0f}{large:11,.0f}")


if __name__ == "__main__":
    main()
