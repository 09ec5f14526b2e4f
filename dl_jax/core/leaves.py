"""The leaves of a tree by name: their paths, types and digests, which checkpoints store, and predicates over them.

A leaf that is split over devices consists of blocks of equal shape, its shards. They are numbered in C order, as the
places of the array of blocks; a leaf that is not split is one block.

A path consists of the fields, keys and indices that lead to a leaf: `opt_state/0/mu/Dense_0/kernel`. Characters of a
key that have a meaning in storage (`/`, `.` and the like) are percent-encoded, so that no two leaves share a path.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError

Tree = Any
Where = Callable[[jax.tree_util.KeyPath, Any], bool]  # chooses parameters by path, shape and dtype, never by value
Leaf = Any  # jax.Array, numpy array, or jax.ShapeDtypeStruct
Box = tuple[tuple[int, int], ...]  # a part of an array: start and stop along each axis


class Spec(NamedTuple):
    """Shape and type of a leaf. A stored leaf can be restored in place of another only if these agree."""

    shape: tuple[int, ...]  # of the numbers: a typed PRNG key is stored as its key data [..., words]
    dtype: str  # numpy's name, or key<implementation>


def named(tree: Tree) -> dict[str, Leaf]:
    """{path: leaf} of a tree. None and empty containers have no leaf.

    Raises TypeError where a leaf is not an array, or two leaves have the same path.
    """
    leaves: dict[str, Leaf] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = "/".join(_quoted(jax.tree_util.keystr((key,), simple=True)) for key in keys)
        if path in leaves:
            raise TypeError(f"two leaves of the tree have the path {path}; rename one")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            raise TypeError(f"leaf {path} is a {type(leaf).__name__}; a checkpoint holds arrays only")
        leaves[path] = leaf
    return leaves


def nested(leaves: Mapping[str, Any], *, decoded: bool = True) -> dict[str, Any]:
    """Nested dicts from {path: leaf}. With `decoded`, percent-encoded characters of the keys are decoded."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = (unquote(key) if decoded else key for key in path.split("/"))
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def spec(leaf: Leaf) -> Spec:
    """Shape and type of a leaf, which may be a `jax.ShapeDtypeStruct`."""
    if not _is_key(leaf):
        return Spec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
    implementation: list[Any] = []  # JAX tells it of arrays only: ask while tracing
    jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)), leaf)
    return Spec(jax.eval_shape(jax.random.key_data, leaf).shape, f"key<{implementation[0]}>")


def stored_values(leaf: Leaf) -> jax.Array | np.ndarray:
    """The array that a checkpoint stores for a leaf.

    It is the key data of a typed PRNG key, and a copy of a NumPy array, because its owner may change it.
    """
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def digest(values: np.ndarray) -> int:
    """CRC-32 of the bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def block_shape(values: jax.Array | np.ndarray) -> tuple[int, ...]:
    """The shape of a shard; that of the array where it is not split, or empty."""
    if isinstance(values, jax.Array) and values.size:
        return values.sharding.shard_shape(values.shape)
    return values.shape


def digests(values: jax.Array | np.ndarray) -> dict[int, int]:
    """{number: CRC-32} of the blocks that this process holds, each once though several devices may have it."""
    if not isinstance(values, jax.Array):
        return {0: digest(values)}
    block = block_shape(values)
    if block == values.shape:
        return {0: digest(np.asarray(values.addressable_data(0)))}
    held = {number_of(box_of(s.index, values.shape), values.shape, block): s.data for s in values.addressable_shards}
    return {number: digest(np.asarray(data)) for number, data in sorted(held.items())}


def blocks_in(box: Box, block: tuple[int, ...]) -> Iterator[Box]:
    """The blocks, of shape `block`, that overlap with a part of an array that is not empty."""
    first = [start // size for (start, _), size in zip(box, block, strict=True)]
    count = [(stop - 1) // size + 1 - a for (_, stop), size, a in zip(box, block, first, strict=True)]
    for place in np.ndindex(*count):
        yield tuple(((a + i) * size, (a + i + 1) * size) for a, i, size in zip(first, place, block, strict=True))


def number_of(box: Box, shape: tuple[int, ...], block: tuple[int, ...]) -> int:
    """The number of a block of an array that is not empty."""
    number = 0
    for (start, _), length, size in zip(box, shape, block, strict=True):
        number = number * (length // size) + start // size
    return number


def box_of(index: Any, shape: tuple[int, ...]) -> Box:
    """The part of an array that an index of slices, such as JAX gives for a shard, stands for."""
    return tuple(each.indices(length)[:2] for each, length in zip(index, shape, strict=True))


def whole_box(shape: tuple[int, ...]) -> Box:
    """All of an array."""
    return tuple((0, length) for length in shape)


def parts_here(like: Leaf) -> set[Box]:
    """The parts of the stored values that this process needs to place them as `like` lies."""
    shape, sharding = spec(like).shape, _committed_to(like)
    if sharding is None:
        return {whole_box(shape)}
    places = sharding.addressable_devices_indices_map(shape).values()
    return {box_of(index, shape) for index in places if index is not None}


def differences(stored: Mapping[str, Spec], model: Mapping[str, Spec]) -> list[str]:
    """One description per differing leaf, sorted by path: its shape or type, or that one side lacks it."""
    return [
        f"{unquote(path)}: {_contrast(stored.get(path), model.get(path))}"
        for path in sorted({*stored, *model})
        if stored.get(path) != model.get(path)
    ]


def place_like(parts: Mapping[Box, np.ndarray], like: Leaf) -> Leaf:
    """A leaf of the same kind as `like`, on the same devices, of the stored values in `parts_here`.

    If `like` is not committed to its devices, the result is not either, so that `jit` may still move it.
    """
    shape, sharding = spec(like).shape, _committed_to(like)
    if isinstance(like, np.ndarray | np.generic):
        return parts[whole_box(shape)]
    placed = (
        jax.device_put(parts[whole_box(shape)])
        if sharding is None
        else jax.make_array_from_callback(shape, sharding, lambda index: parts[box_of(index, shape)])
    )
    if not _is_key(like):
        return placed
    return jax.random.wrap_key_data(placed, impl=spec(like).dtype.removeprefix("key<").removesuffix(">"))


def _committed_to(like: Leaf) -> Any:
    """The sharding of a leaf; None for NumPy's, and where `jit` may move it."""
    if isinstance(like, np.ndarray | np.generic) or (isinstance(like, jax.Array) and not like.committed):
        return None
    return like.sharding


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _quoted(key: str) -> str:
    return quote(key, safe="").replace(".", "%2E")


def _contrast(stored: Spec | None, model: Spec | None) -> str:
    if stored is None:
        return "in the model, not in the checkpoint"
    if model is None:
        return "in the checkpoint, not in the model"
    if stored.dtype == model.dtype:
        return f"checkpoint {stored.shape}, model {model.shape}"
    return f"checkpoint {stored.dtype} {stored.shape}, model {model.dtype} {model.shape}"


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """A path for messages, such as "Dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_real(leaf: Leaf) -> bool:
    """Whether a leaf holds floating-point (or complex) numbers, rather than counters, flags or keys."""
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def at_least_float32(x: Any) -> Any:
    """An array, JAX's or NumPy's, in float32, or in its own type if that is wider.

    Sums in 16 bits and of small integers lose digits, and differences of 16-bit numbers may be infinite.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def is_kernel(path: jax.tree_util.KeyPath, leaf: jax.Array) -> bool:
    """Whether a parameter is a weight matrix or filter: Flax names these `kernel`. Biases and norm scales are not."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def chosen(params: Tree, where: Where) -> Tree:
    """A tree like `params` of bools: whether `where` chooses the leaf. It can serve Optax as a mask, `adamw(mask=...)`.

    Raises InputError where `where` chooses no leaf, because then the predicate is wrong.
    """
    mask = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(where(path, leaf)), params)
    if not any(jax.tree.leaves(mask)):
        paths = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise InputError(
            f"`where` chooses none of the {len(paths)} parameters ({', '.join([*paths[:4], '...'][: len(paths)])}), "
            "expected at least one; give a predicate (path, leaf) -> bool that fits these names"
        )
    return mask
