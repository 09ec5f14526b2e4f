"""The compressed file: round trips to the last bit, sizes against the entropy, and files that are damaged or forged."""

import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dl_jax.compress.codec import decode, encode, entries
from dl_jax.compress.codec.file import DEEPEST, DTYPES, MAGIC, VERSION
from dl_jax.compress.codec.wire import integer
from dl_jax.core.errors import InputError

RNG = np.random.default_rng(0)


def same(a: dict, b: dict) -> bool:
    """The same keys, types, shapes and bits."""
    if not isinstance(a, dict):
        a = np.asarray(a)
        return type(b) is np.ndarray and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def shared(shape: tuple[int, ...], kept: float, kinds: int) -> np.ndarray:
    """A pruned kernel with shared weights."""
    values = np.unique(RNG.normal(size=kinds)).astype(np.float32)
    return np.where(RNG.random(shape) < kept, RNG.choice(values, shape), 0).astype(np.float32)


def round_trip(leaf: np.ndarray) -> bytes:
    data = encode({"leaf": leaf})
    assert same({"leaf": leaf}, decode(data))
    return data


# Entries


def test_distances_are_the_papers() -> None:
    """Figure 2 of the paper: numbers at 1, 4 and 15, a filler at 12; the paper counts the first from place 0."""
    occupied = np.isin(np.arange(16), [1, 4, 15])
    assert (entries.distances(occupied, 3) - [1, 0, 0, 0]).tolist() == [1, 3, 8, 3]


@given(hnp.arrays(bool, st.integers(0, 300), elements=st.sampled_from([False, False, False, True])), st.integers(0, 8))
def test_entries_cover_the_leaf(occupied: np.ndarray, bits: int) -> None:
    found = entries.distances(occupied, bits)
    assert found.sum() == len(occupied)
    assert ((found >= 1) & (found <= 1 << bits)).all()
    assert occupied[np.cumsum(found) - 1].sum() == occupied.sum()
    (places,) = np.nonzero(occupied)
    gaps = np.diff(places, prepend=-1, append=len(occupied) - 1)  # one by one: ceil(gap / 2^bits) entries each
    assert len(found) == sum(-(-int(gap) // (1 << bits)) for gap in gaps)


# Round trips


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (20, 30), (2, 3, 4, 5)])
def test_every_type_and_shape(name: str, shape: tuple[int, ...]) -> None:
    leaf = RNG.integers(0, 100, shape) * (RNG.random(shape) < 0.3)
    round_trip(np.asarray(leaf, jnp.dtype(name)))


@settings(deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
        fill=st.just(0),
    )
)
def test_any_array(leaf: np.ndarray) -> None:
    round_trip(leaf)


def test_special_floats_keep_their_bits() -> None:
    patterns = np.array([0, 1 << 31, 1, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000], np.uint32)
    for leaf in (patterns, np.repeat(patterns, 50), np.pad(patterns, 900)):
        assert decode(encode({"w": leaf.view(np.float32)}))["w"].view(np.uint32).tolist() == leaf.tolist()


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 100_000])
def test_zeros_and_a_number_at_either_end(size: int) -> None:
    zeros = np.zeros(size, np.float32)
    first, last = zeros.copy(), zeros.copy()
    first[0], last[-1] = 1.5, -0.0
    for leaf in (zeros, first, last):
        assert len(round_trip(leaf)) < 80 + size / 100


def test_one_kind_of_number() -> None:
    assert len(round_trip(np.full((50, 80), 0.25, np.float32))) < 4000 / 8 + 50


def test_a_tree_comes_back_as_plain_dicts() -> None:
    tree = {
        "params": {"Dense_0": {"kernel": shared((30, 20), 0.1, 5), "bias": jnp.ones(20)}, "a/b.c %é": np.ones(2)},
        "": {"": np.int8(3)},
        "list": [np.zeros(1), {"x": np.ones(1)}],
        "none": None,
        "empty": {},
    }
    expected = {
        "params": tree["params"],
        "": tree[""],
        "list": {"0": np.zeros(1), "1": {"x": np.ones(1)}},
    }
    found = decode(encode(tree))
    assert same(expected, found)
    found["params"]["Dense_0"]["bias"][0] = 5  # ours to write to
    assert decode(encode({})) == {}


def test_layouts_of_memory_do_not_matter() -> None:
    leaf = shared((30, 40), 0.2, 9)
    data = encode({"w": leaf})
    assert encode({"w": np.asfortranarray(leaf)}) == data
    assert encode({"w": leaf.astype(">f4")}) == data
    assert encode({"w": np.repeat(leaf, 2, 1)[:, ::2]}) == data
    assert encode({"w": jnp.asarray(leaf)}) == data


# Sizes


def entropy_bytes(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return counts @ np.log2(counts.sum() / counts) / 8


def test_a_shared_sparse_kernel_comes_near_its_entropy() -> None:
    leaf = shared((784, 300), 0.08, 64)
    nonzero = leaf[leaf != 0]
    gaps = np.diff(np.flatnonzero(leaf), prepend=-1)
    bound = entropy_bytes(nonzero) + entropy_bytes(gaps)
    size = len(round_trip(leaf))
    assert bound < size < 1.015 * bound + 4 * 64 + 150  # Huffman's rounding; the codebook; distances and names


def test_dense_numbers_are_stored_as_they_are() -> None:
    leaf = RNG.normal(size=(300, 100)).astype(np.float32)
    assert len(round_trip(leaf)) <= leaf.nbytes + 30


def test_dense_numbers_of_few_kinds_take_their_entropy() -> None:
    leaf = RNG.integers(-2, 2, (200, 200)).astype(np.int8)
    assert len(round_trip(leaf)) < 40_000 / 4 + 50  # two bits each, and no distances


def test_pruned_numbers_without_a_codebook() -> None:
    leaf = np.where(RNG.random((300, 100)) < 0.1, RNG.normal(size=(300, 100)), 0).astype(np.float32)
    kept = np.count_nonzero(leaf)
    assert len(round_trip(leaf)) < kept * (4 + 6 / 8)


def test_the_better_axis_runs_fastest() -> None:
    rows = np.zeros((200, 200), np.float32)
    rows[::20] = 1  # whole rows: distance 1 along them
    size = len(round_trip(rows))
    assert len(round_trip(np.ascontiguousarray(rows.T))) == size < 1000


def test_the_format_stays() -> None:
    """A file byte by byte, worked out by hand: what version 1 wrote is read for ever."""
    leaf = np.zeros(600, np.int16)
    leaf[[1, 2, 3, 300]] = [7, 7, -1, 7]
    expected = (
        "89 44 4c 4a 0d 0a 1a 01"  # magic, version
        "01 77 05 01 d804"  # path w, int16, one axis of 600 numbers
        "02 07"  # sparse, of 7 entries
        "00 01 00 00 ff 28 ff 2a"  # distances as they are, each less 1: two fillers of 256, the end at place 599
        "02 01 02 0700 0000 ffff"  # a code of 2 bits at most: 7 is 0, 0 is 10, -1 is 11
        "02 39 40"  # 7 7 -1 0 7 0 0: 0 0 11 10 0 10 10
        "fb526186"  # CRC-32
    )
    assert encode({"w": leaf}) == bytes.fromhex(expected)
    assert same({"w": leaf}, decode(bytes.fromhex(expected)))


# Files that are not ours, damaged or forged


def forged(content: bytes) -> bytes:
    """`content` behind our magic, with a checksum that fits."""
    data = MAGIC + bytes([VERSION]) + content
    return data + zlib.crc32(data).to_bytes(4, "little")


def content(data: bytes) -> bytes:
    return data[len(MAGIC) + 1 : -4]


def attempt(data: bytes) -> None:
    """Whatever is in a file, `decode` gives a tree or one clear error."""
    message = ""
    try:
        decode(data)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 400


SMALL = {
    "Dense_0": {"kernel": shared((12, 9), 0.3, 5), "bias": RNG.normal(size=3).astype(np.float32)},
    "few": RNG.integers(0, 3, (4, 20)).astype(np.int8),
    "zeros": np.zeros(700, np.float64),
}
GOOD = encode(SMALL)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no compressed model: it begins with b''"),
        (b"PK\x03\x04 something else", "no compressed model: it begins with b'PK"),
        (MAGIC, "the checksum of its 7 bytes is wrong"),
        (MAGIC + bytes([VERSION]), "checksum"),
        (GOOD[:-1], "checksum"),
        (GOOD + b"\n", "checksum"),
        (GOOD.replace(b"\r\n", b"\n"), "no compressed model"),
    ],
)
def test_a_file_that_is_not_ours(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(data)


def test_another_version() -> None:
    data = MAGIC + bytes([VERSION + 1])
    with pytest.raises(InputError, match=f"version {VERSION + 1}, expected {VERSION}"):
        decode(data + zlib.crc32(data).to_bytes(4, "little"))


def test_every_flip_and_truncation_is_found() -> None:
    data = GOOD
    for i in range(len(data)):
        with pytest.raises(InputError):
            decode(data[:i])
        for bit in range(8):
            with pytest.raises(InputError):
                decode(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])


def test_every_forged_byte_and_truncation() -> None:
    good = content(GOOD)
    for i in range(len(good)):
        attempt(forged(good[:i]))
        for byte in {0, 1, 2, 0x7F, 0x80, 0xFF, *(good[i] ^ 1 << bit for bit in range(8))}:
            attempt(forged(good[:i] + bytes([byte]) + good[i + 1 :]))


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    attempt(data)
    attempt(MAGIC + data)
    attempt(forged(data))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.binary(max_size=9)), min_size=1, max_size=4))
def test_forged_pieces(edits: list[tuple[int, int, bytes]]) -> None:
    data = content(GOOD)
    for at, gone, piece in edits:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + gone :]
    attempt(forged(data))


def numbers(*values: int) -> bytes:
    return b"".join(map(integer, values))


HUGE = 2**40
NAMED = b"\x01w" + numbers(0)  # a leaf of the path w, float32
CODE = numbers(1, 2) + np.array([0, 1], np.uint32).tobytes()  # two numbers of a bit each
STEPS = numbers(1, 2) + bytes([0, 255])  # distances of 1 and 256


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (numbers(HUGE), "bytes wanted"),  # a path of a terabyte
        (NAMED + numbers(1, HUGE, 0, 0), f"{4 * HUGE} bytes wanted"),  # as many numbers as they are
        (NAMED + numbers(1, HUGE, 0) + CODE + numbers(1) + b"x", f"{HUGE} symbols in 8 bits"),
        (NAMED + numbers(1, HUGE, 2, HUGE) + STEPS + numbers(1) + b"x", f"{HUGE} symbols in 8 bits"),
        (NAMED + numbers(1, HUGE, 2, 8) + STEPS + numbers(1) + b"x" + CODE + numbers(1) + b"x", "do not end where"),
        (NAMED + numbers(1, 9, 2, 0, 0, 0), "do not end where"),
        (NAMED + numbers(1, 8, 0, HUGE), f"a code of {HUGE} bits"),
        (NAMED + numbers(1, 8, 0, 1, HUGE), "bytes wanted"),  # a codebook
        (NAMED + numbers(1, 8, 0, 1, 1) + bytes(4) + numbers(HUGE), "bytes wanted"),  # a stream
        (NAMED + numbers(1, 8, 0, 2, 0, 3) + bytes(12) + numbers(2) + bytes(2), "no Huffman code"),  # a word to spare
        (NAMED + numbers(1, 8, 0, 1, 3) + bytes(12) + numbers(2) + bytes(2), "no Huffman code"),  # one too many
        (NAMED + numbers(1, 8, 0, 3, 0, 0, 0) + numbers(1) + b"x", "no Huffman code"),
        (NAMED + numbers(1, 8, 0) + CODE + numbers(2) + b"xx", "8 symbols end at bit 8 of 16"),
        (NAMED + numbers(1, 8, 4), "layout 4"),
        (NAMED + numbers(65), "65 axes"),
        (NAMED + numbers(4, *[2**20] * 4), "a shape beyond all memory"),
        (NAMED + numbers(3, 0, HUGE, HUGE), "a shape beyond all memory"),  # empty, and yet beyond NumPy
        (b"\x01w" + numbers(12, 0), "type 12"),
        (NAMED + b"\xff" * 10, "more than 63 bits"),
        (numbers(2 * DEEPEST) + b"/" * 2 * DEEPEST + numbers(0, 0), f"{2 * DEEPEST + 1} levels"),
        (2 * (NAMED + numbers(1, 0, 0, 0)), "two leaves of the path 'w'"),
        (NAMED + numbers(1, 0, 0, 0) + b"\x03w/x" + numbers(0, 1, 0, 0, 0), "'w' is both a leaf and a branch"),
        (b"\x03%61" + numbers(0, 1, 0, 0, 0), "not spelt"),
        (b"\x02\xc3\xa9" + numbers(0, 1, 0, 0, 0), "not spelt"),
    ],
)
def test_forged_content_is_refused_before_memory_is_taken(leaf: bytes, message: str) -> None:
    data = forged(leaf)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_of_zeros_grows_with_what_it_holds() -> None:
    """No few bytes stand for much: a bit for 256 zeros at most."""
    for size in (10**5, 10**6):
        assert len(round_trip(np.zeros(size, np.int8))) > size / 256 / 8


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (np.zeros(3), "a bare ndarray"),
        ({"a": np.zeros(3, bool)}, "leaf a of type bool"),
        ({"a": {"b": np.zeros(3, complex)}}, "leaf a/b of type complex128"),
        ({"a": np.array(["x"])}, "leaf a of type str"),
        ({"a": "text"}, "leaf a is a str"),
        ({"a": 1.5}, "leaf a is a float"),
    ],
)
def test_what_cannot_be_encoded(tree: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(tree)


def test_a_tree_that_is_too_deep() -> None:
    tree: dict = {"x": np.zeros(1)}
    for _ in range(DEEPEST - 1):
        tree = {"x": tree}
    assert same(tree, decode(encode(tree)))
    with pytest.raises(InputError, match=f"at most {DEEPEST} levels"):
        encode({"x": tree})
