"""Huffman codes against a heap, Kraft's equality and the entropy, and streams that are damaged."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl_jax.compress.codec import huffman
from dl_jax.compress.codec.wire import DamagedError, Reader

RNG = np.random.default_rng(0)


def heap_length(counts: list[int]) -> int:
    """Bits of an optimal code for all symbols together: the sum of all merges."""
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@given(st.lists(st.integers(1, 1000) | st.integers(1, 10**9), min_size=2, max_size=300))
def test_code_lengths_are_optimal_and_complete(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    assert sum(2.0**-lengths) == 1  # Kraft
    assert lengths @ counts == heap_length(counts)
    share = np.array(counts) / sum(counts)
    entropy = -share @ np.log2(share)
    assert entropy - 1e-9 <= share @ lengths < entropy + 1


def test_one_symbol_takes_a_bit() -> None:
    assert huffman.code_lengths(np.array([7])).tolist() == [1]


def test_codes_are_the_canonical_ones() -> None:
    # Lengths 1, 2, 3, 3: the codes 0, 10, 110, 111, written 0 10 110 111 0 = 0101 1011 10.. ....
    packed = huffman.pack(np.array([0, 1, 2, 3, 1]), np.array([1, 2, 3, 3]))
    assert packed == bytes([0b01011011, 0b11000000])
    assert huffman.unpack(packed, 5, np.array([1, 2, 3, 3])).tolist() == [0, 1, 2, 3, 1]


def test_the_longest_codes() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < huffman.LONGEST + 1:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = np.sort(huffman.code_lengths(np.array(fibonacci)))
    assert lengths[-1] == huffman.LONGEST
    ranks = RNG.permutation(np.repeat(np.arange(len(lengths)), 3))
    assert (huffman.unpack(huffman.pack(ranks, lengths), len(ranks), lengths) == ranks).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_symbols_come_back(counts: list[int], random) -> None:
    symbols = np.repeat(np.arange(len(counts)), counts)
    random.shuffle(symbols)
    alphabet = np.arange(100, 100 + len(counts), dtype=np.uint32)
    reader = Reader(huffman.write(symbols, alphabet))
    assert (huffman.read(reader, len(symbols), alphabet.dtype) == alphabet[symbols]).all()
    assert reader.left == 0


def test_a_stream_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huffman, "CHUNK", 5)
    ranks = RNG.integers(0, 4, 1000)
    lengths = np.array([1, 2, 3, 3])
    assert (huffman.unpack(huffman.pack(ranks, lengths), 1000, lengths) == ranks).all()


def test_a_damaged_code_is_an_error_of_its_own_kind() -> None:
    with pytest.raises(DamagedError, match="3 symbols end at bit"):
        huffman.unpack(bytes(2), 3, np.array([1, 1]))
