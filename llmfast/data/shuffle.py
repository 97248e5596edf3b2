"""Randomness that is a function of its inputs: no state to save, the same on every machine and numpy version."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# A Feistel network of four rounds is a pseudo-random permutation of a large range (Luby and Rackoff, 1988). Six, as
# for ranges of 16 to 50 four were measurably uneven (chi-square over 100,000 keys); below that six are, slightly.
_ROUND_KEYS = (np.arange(6, dtype=np.uint64) * _GOLDEN).reshape(3, 2)


def mix(seed: int, index: np.ndarray) -> np.ndarray:
    """uint64 [N]: number `index` (int [N]) of the SplitMix64 sequence that `seed` starts (Steele et al., 2014)."""
    start = _scramble(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    return _scramble(start + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def permuted(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """int64 [N]: where a random permutation of range(n), the one that `keys` (uint64 [N]) names, sends `index` [N].

    A Feistel network permutes the next power of two; what lands at n or above goes through again until it lands
    below (cycle walking), which leaves a permutation of range(n). No table of n entries is ever made, so any position
    of any epoch costs the same.
    """
    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    x = index.astype(np.uint64)
    walking = np.arange(x.size)
    while walking.size:
        high, low, key = x[walking] >> low_bits, x[walking] & low_mask, keys[walking]
        for even, odd in _ROUND_KEYS:
            high ^= _scramble(low ^ (key + even)) & high_mask
            low ^= _scramble(high ^ (key + odd)) & low_mask
        x[walking] = (high << low_bits) | low
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # modulo 2**64, as arrays do without a warning
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
