"""What a transformer's gradient takes of memory against the length of its texts, with and without rematerialisation.

    pip install libtpu
    python benchmarks/attention.py            a few minutes
    python benchmarks/attention.py --quick    short texts only

The network is nanoGPT's for a CPU (4 blocks of 128 values, 4 heads) with places for 4,096 tokens. Its gradient for 8
texts is compiled for one chip of a TPU v5e, which need not be there, and the memory is what the compiler plans for
temporary arrays in the chip's main memory. On a CPU the memory was the same with and without, 3.2 GiB for one text of
4,096 tokens; why is not known.
"""

import argparse
import functools
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.problems import HEADS, LAYERS, VOCABULARY, WIDTH
from dl_jax import losses
from dl_jax.harness.machine import git_state, versions
from dl_jax.harness.plan.chips import slice_of
from dl_jax.harness.plan.make import devices_of
from dl_jax.models.sequence.attention import TransformerLM

TEXTS = 8
LENGTHS = (16, 64, 256, 1024, 4096)
CHIPS = "v5e:2x2"


def gradient_bytes(length: int, remat: bool, device: Any) -> int:
    """The temporary memory in bytes of the gradient for `TEXTS` texts of `length` tokens on `device`."""
    model: Any = TransformerLM(VOCABULARY, max(LENGTHS), WIDTH, LAYERS, HEADS, remat=remat)
    place = SingleDeviceSharding(device)
    tokens = jax.ShapeDtypeStruct((TEXTS, length), jnp.int32, sharding=place)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), variables)

    def loss(variables, tokens):
        logits = model.apply(variables, tokens, train=True)
        return losses.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()

    lowered = jax.jit(jax.grad(loss)).trace(variables, tokens).lower(lowering_platforms=(device.platform,))
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compile for texts of up to 64 tokens")
    lengths = [length for length in LENGTHS if length <= 64 or not parser.parse_args().quick]
    device = devices_of(slice_of(CHIPS))[0]
    code = git_state(Path(__file__).parent)
    print(f"temporary memory of a gradient on {device.device_kind}, planned by the compiler")
    print(f"commit {code['commit']}{'' if code['clean'] else ' with uncommitted changes'}")
    used = {**versions(), "libtpu": importlib.metadata.version("libtpu")}
    print(", ".join(f"{name} {version}" for name, version in used.items()) + "\n")
    print(f"{'tokens':>6} {'MiB':>9} {'MiB, rematerialised':>20}")
    for length in lengths:
        plain, again = (gradient_bytes(length, remat, device) / 2**20 for remat in (False, True))
        print(f"{length:>6,} {plain:>9,.1f} {again:>20,.1f}", flush=True)


if __name__ == "__main__":
    main()
