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


@settings(max_examples=50)
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
def test_every_type_and_shape(name: str) -> None:
    for shape in [(), (0,), (1,), (7,), (3, 0, 2), (20, 30), (2, 3, 4, 5)]:
        leaf = RNG.integers(0, 100, shape) * (RNG.random(shape) < 0.3)
        round_trip(np.asarray(leaf, jnp.dtype(name)))


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
        fill=st.just(0),
    )
)
def test_any_array(leaf: np.ndarray) -> None:
    round_trip(leaf)


@pytest.mark.parametrize("name", [name for name in DTYPES if "float" in name])
def test_special_floats_keep_their_bits(name: str) -> None:
    """Both zeros and infinities, the least numbers of both signs, and NaNs, quiet and signalling, with payloads."""
    dtype = jnp.dtype(name)
    sign, infinity = 1 << 8 * dtype.itemsize - 1, int(np.array(np.inf, dtype).view(f"u{dtype.itemsize}"))
    halves = [0, 1, infinity, infinity + 1, sign - 1, sign - 3]
    patterns = np.array([*halves, *(sign | half for half in halves)], f"u{dtype.itemsize}")
    for leaf in (patterns, np.repeat(patterns, 50), np.pad(patterns, 900)):
        assert decode(encode({"w": leaf.view(dtype)}))["w"].view(patterns.dtype).tolist() == leaf.tolist()


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 100_000])
def test_zeros_and_a_number_at_either_end(size: int) -> None:
    zeros = np.zeros(size, np.float32)
    first, last = zeros.copy(), zeros.copy()
    first[0], last[-1] = 1.5, -0.0
    for leaf in (zeros, first, last):
        assert len(round_trip(leaf)) < 80 + size / 100


def test_one_kind_of_number() -> None:
    assert len(round_trip(np.full((50, 80), 0.25, np.float32))) < 4000 / 8 + 60


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
    assert encode({"w": leaf}) == data
    assert encode({"w": np.asfortranarray(leaf)}) == data
    assert encode({"w": leaf.astype(">f4")}) == data
    assert encode({"w": np.repeat(leaf, 2, 1)[:, ::2]}) == data
    assert encode({"w": jnp.asarray(leaf)}) == data


# Sizes


# Versions of zlib differ in their bytes, so sizes are held against the entropy: 2 % for whole bits a code and for
# what is left at the ends of blocks, a table of up to 90 bytes for each of these, and the names.


def entropy_bytes(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return counts @ np.log2(counts.sum() / counts) / 8


def test_a_shared_sparse_kernel_comes_near_its_entropy() -> None:
    leaf = shared((784, 300), 0.08, 64)
    nonzero = leaf[leaf != 0]
    gaps = np.diff(np.flatnonzero(leaf), prepend=-1)
    bound = entropy_bytes(nonzero) + entropy_bytes(gaps)
    size = len(round_trip(leaf))
    assert bound < size < 1.02 * bound + 4 * 64 + 2 * 90 + 30


def test_lenet_300_100_of_the_paper() -> None:
    """With 8, 9 and 26 % of the weights and 63 values per layer the paper's file is 40 times smaller."""
    tree = {}
    for i, (shape, kept) in enumerate([((784, 300), 0.08), ((300, 100), 0.09), ((100, 10), 0.26)]):
        weights = RNG.laplace(size=shape).astype(np.float32)
        ranks = np.abs(weights).ravel().argsort().argsort().reshape(shape)
        step = (weights.max() - weights.min()) / 62
        tree[f"Dense_{i}"] = {
            "kernel": np.where(ranks >= (1 - kept) * weights.size, np.rint(weights / step) * step, np.float32(0)),
            "bias": RNG.normal(size=shape[1]).astype(np.float32),
        }
    data = encode(tree)
    assert same(tree, decode(data))
    assert len(data) < sum(leaf.nbytes for layer in tree.values() for leaf in layer.values()) / 36


def test_dense_floats_take_the_entropy_of_their_bytes() -> None:
    leaf = RNG.normal(size=(300, 100)).astype(np.float32)
    bound = sum(map(entropy_bytes, leaf.view(np.uint8).reshape(-1, 4).T))
    assert bound < len(round_trip(leaf)) < 1.02 * bound + 4 * 90 + 30 < 0.9 * leaf.nbytes


def test_noise_stays_as_large_as_it_is() -> None:
    leaf = RNG.integers(0, 1 << 32, 30_000, dtype=np.uint32)
    assert len(round_trip(leaf)) < 1.001 * leaf.nbytes + 30


def test_dense_numbers_of_few_kinds_take_their_entropy() -> None:
    leaf = RNG.integers(-2, 2, (200, 200)).astype(np.int8)
    # Two bits each and no distances; one of the four codes is longer, for the end of a block takes one as well.
    assert len(round_trip(leaf)) < 40_000 * 2.25 / 8 + 100


def test_pruned_numbers_without_a_codebook() -> None:
    leaf = np.where(RNG.random((300, 100)) < 0.1, RNG.normal(size=(300, 100)), 0).astype(np.float32)
    kept = np.count_nonzero(leaf)
    assert len(round_trip(leaf)) < kept * (4 + 6 / 8)  # six bits of distance


def test_the_better_axis_runs_fastest() -> None:
    rows = np.zeros((200, 200), np.float32)
    rows[::20] = 1  # whole rows: distance 1 along them
    size = len(round_trip(rows))
    assert len(round_trip(np.ascontiguousarray(rows.T))) == size < 1000


def test_the_format_stays() -> None:
    """Files byte by byte, worked out by hand: what version 2 wrote is read for ever, and version 1 never again."""
    sparse = np.zeros(600, np.int16)
    sparse[[1, 2, 3, 300]] = [7, 7, -1, 7]
    dense = np.array([[1, -2]], np.int16)
    expected = (
        "89 44 4c 4a 0d 0a 1a 02"  # magic, version
        "01 64 05 02 01 02"  # path d, int16, two axes of 1 and 2 numbers
        "00 00"  # dense, no codebook
        "09 01 0400 fbff 01 fe 00 ff"  # 9 bytes, a last block as it is, of 4 bytes: the low ones, the high ones
        "01 77 05 01 d804"  # path w, int16, one axis of 600 numbers
        "02 07"  # sparse, of 7 entries
        "0c 01 0700 f8ff 01 00 00 ff 28 ff 2a"  # distances, each less 1: two fillers of 256, the end at place 599
        "03 0000 0700 ffff"  # three kinds: 0, 7, -1
        "0c 01 0700 f8ff 01 01 02 00 01 00 00"  # 7 7 -1 0 7 0 0
        "02bbbb7d"  # CRC-32
    )
    assert same({"d": dense, "w": sparse}, decode(bytes.fromhex(expected)))
    version_1 = "89444c4a0d0a1a01 01770501d804 0207 000100 00ff28ff2a 02010207000000ffff 023940 fb526186"
    with pytest.raises(InputError, match=r"version 1, expected 2; no release reads it, encode the network again$"):
        decode(bytes.fromhex(version_1))


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
    for i, byte in enumerate(GOOD):
        for data in (GOOD[:i], GOOD[:i] + bytes([byte ^ 1 << i % 8]) + GOOD[i + 1 :]):
            with pytest.raises(InputError):
                decode(data)


def test_every_forged_byte_and_truncation() -> None:
    good = content(GOOD)
    for i, byte in enumerate(good):
        attempt(forged(good[:i]))
        for other in {0, 0xFF, byte ^ 1, byte ^ 0x80, byte + 1 & 0xFF}:
            attempt(forged(good[:i] + bytes([other]) + good[i + 1 :]))


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    attempt(data)
    attempt(MAGIC + data)
    attempt(forged(data))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.binary(max_size=9)), min_size=1, max_size=4))
def test_forged_pieces(edits: list[tuple[int, int, bytes]]) -> None:
    data = content(GOOD)
    for at, gone, piece in edits:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + gone :]
    attempt(forged(data))


def numbers(*values: int) -> bytes:
    return b"".join(map(integer, values))


def stream(content: bytes, last: bool = True) -> bytes:
    """`content` as deflate has it uncompressed, after its length."""
    length = len(content).to_bytes(2, "little")
    data = bytes([last]) + length + bytes(255 - byte for byte in length) + content
    return integer(len(data)) + data


def bomb(n: int) -> bytes:
    """A deflate stream of a thousandth of the size of the `n` zeros that it expands to."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = coder.compress(bytes(n)) + coder.flush()
    assert len(data) < n / 900
    return integer(len(data)) + data


def refused(data: bytes, message: str, limit: int) -> None:
    """Checks that `decode` refuses `data` in one line that matches, before it allocates memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            decode(data, limit)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


HUGE = 2**40
FLOATS, BYTES = (b"\x01w" + numbers(code) for code in (0, 8))  # a leaf of the path w, float32 or uint8
EMPTY = numbers(1, 0, 0, 0) + stream(b"")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (numbers(HUGE), "bytes expected"),  # a path of a terabyte
        (FLOATS + numbers(1, HUGE, 0, 0) + stream(b"x"), f"not end after {HUGE} numbers of 4 bytes"),
        (FLOATS + numbers(1, HUGE, 2, HUGE) + stream(b"x"), f"not end after {HUGE} numbers of 1 bytes"),
        (FLOATS + numbers(1, 8, 2, 9) + stream(bytes(9)), "9 entries in a leaf of 8"),
        (FLOATS + numbers(1, 8, 2, HUGE), f"{HUGE} entries in a leaf of 8"),
        (FLOATS + numbers(1, 8, 2, 2) + stream(b"\x00\x05"), "2 entries that do not end where"),
        (FLOATS + numbers(1, 8, 2, 2) + stream(b"\x00\x07"), "2 entries that do not end where"),
        (FLOATS + numbers(1, 8, 2, 0) + stream(b""), "0 entries that do not end where"),
        (FLOATS + numbers(1, 8, 0, HUGE), "bytes expected"),  # a codebook
        (FLOATS + numbers(1, 8, 0, 0, HUGE), "bytes expected"),  # a stream
        (BYTES + numbers(1, 3, 0, 2) + b"ab" + stream(b"\x00\x01\x02"), "index 2 into a codebook of 2"),
        (BYTES + numbers(1, 3, 0, 0) + stream(b"ab"), "not end after 3"),
        (BYTES + numbers(1, 3, 0, 0) + stream(b"abcd"), "not end after 3"),
        (BYTES + numbers(1, 3, 0, 0) + stream(b"abc", last=False), "not end after 3"),  # more was to come
        (BYTES + numbers(1, 3, 0, 0, 9) + stream(b"abc")[1:] + b"x", "not end after 3"),  # more than deflate's own end
        (BYTES + numbers(1, 0, 0, 0) + bomb(10**8), "not end after 0"),
        (BYTES + numbers(1, 3, 0, 0) + bomb(10**8), "not end after 3"),
        (BYTES + numbers(1, 3, 0, 0, 1) + b"\x07", "not deflate: Error -3"),
        (FLOATS + numbers(1, 8, 4), "layout 4"),
        (FLOATS + numbers(65), "65 axes"),
        (FLOATS + numbers(4, *[2**20] * 4), "a shape too large for any memory"),
        (FLOATS + numbers(3, 0, HUGE, HUGE), "a shape too large for any memory"),  # empty, and yet beyond NumPy
        (b"\x01w" + numbers(12, 0), "type 12"),
        (FLOATS + b"\xff" * 10, "more than 63 bits"),
        (numbers(2 * DEEPEST) + b"/" * 2 * DEEPEST + numbers(0, 0), f"{2 * DEEPEST + 1} levels"),
        (2 * (FLOATS + EMPTY), "two leaves have the path 'w'"),
        (FLOATS + EMPTY + b"\x03w/x\x00" + EMPTY, "'w' is both a leaf and a branch"),
        (b"\x03%61\x00" + EMPTY, "not percent-encoded"),
        (b"\x02\xc3\xa9\x00" + EMPTY, "not percent-encoded"),
    ],
)
def test_forged_content_is_refused_before_memory_is_taken(leaf: bytes, message: str) -> None:
    refused(forged(leaf), f"^damaged compressed model: .*{message}", limit=2**62)


def test_the_numbers_of_the_types_stay() -> None:
    floats, integers = "float32 float64 float16 bfloat16", "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
    for code, name in enumerate([*floats.split(), *integers.split()]):
        assert decode(forged(b"\x01w" + numbers(code) + EMPTY))["w"].dtype.name == name


def test_the_limit_is_that_of_the_whole_tree() -> None:
    tree = {"a": np.zeros(1000, np.float32), "b": {"c": np.zeros((10, 100)), "d": np.zeros(0)}}
    data = encode(tree)
    assert same(tree, decode(data, limit=12_000))
    refused(data, "^compressed model of 12000 bytes or more, expected at most 11999; pass a higher limit", 11_999)


@pytest.mark.parametrize("layout", [numbers(0, 0), numbers(2, 10**9)])
def test_a_bomb_is_refused_by_what_it_says_of_itself(layout: bytes) -> None:
    data = forged(BYTES + numbers(1, 2 * 10**9 + 1) + layout + bomb(10**6))
    with pytest.raises(InputError, match="of 2000000001 bytes or more, expected at most 2000000000"):
        decode(data)
    refused(data, "of 2000000001 bytes or more", 2 * 10**9)


@pytest.mark.parametrize("layout", [b"", numbers(2, 10**6) + bomb(10**6), numbers(3, 10**6) + bomb(10**6)])
@pytest.mark.parametrize("codebook", [b"\x00", b"\x01x"])
def test_the_memory_of_a_bomb_within_the_limit(layout: bytes, codebook: bytes) -> None:
    """Numbers of one byte that are all entries take the most memory per byte of the tree."""
    data = forged(BYTES + numbers(1, 10**6) + (layout or numbers(0)) + codebook + bomb(10**6))
    tracemalloc.start()
    try:
        assert decode(data)["w"].nbytes == 10**6
        assert tracemalloc.get_traced_memory()[1] < 12 * 10**6
    finally:
        tracemalloc.stop()


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
