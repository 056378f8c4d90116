"""A shuffle that is computed, never stored: element i of a permutation of range(size) in constant time.

A run can then resume at any batch from its number alone, and a shuffle of a billion windows costs no memory.

The permutation is a small block cipher over exactly the numbers below `size`: a Feistel network whose halves are
numbers below `side` and are combined by modular addition, so that it permutes range(side * side) with
side = ceil(sqrt(size)); a value that falls outside range(size) is encrypted again until it falls inside ("cycle
walking"). Both are from Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections 3-4.
Every operation is on 64-bit integers, so every machine computes the same order. It shuffles; it is not a secret.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

# One 64-byte digest holds the keys of eight rounds. Four make a Feistel network look random in theory; tiny
# domains, where the halves have few values, need the rest.
_ROUNDS = 8


def permute(indices: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns where the permutation of range(size) that belongs to (seed, epoch) sends each index.

    Args:
        indices: int64 [K], each in [0, size).
        size: how many things are shuffled; at least 1.
        seed: any integer.
        epoch: any integer; each has its own permutation.

    Returns:
        int64 [K].

    Raises:
        ValueError: if `size` is below 1 or an index lies outside range(size).
    """
    if size < 1:
        raise ValueError(f"cannot permute {size} things: size must be at least 1")
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"indices {indices.min()}..{indices.max()} reach outside range({size})")
    side = math.isqrt(size - 1) + 1
    keys = _round_keys(seed, epoch)
    result = _encrypt(indices.astype(np.uint64), side, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _encrypt(result[outside], side, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"titan-data order, seed {seed}, epoch {epoch}".encode(), digest_size=8 * _ROUNDS)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _encrypt(values: NDArray[np.uint64], side: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = np.divmod(values, np.uint64(side))
    for key in keys:
        left, right = right, (left + _mix(right + key) % np.uint64(side)) % np.uint64(side)
    return left * np.uint64(side) + right


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), modulo 2^64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
