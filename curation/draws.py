"""A number for each row that only its uid and a seed decide: stable under re-sharding and growth."""

from __future__ import annotations

import numpy as np
import polars as pl

_BLOCK = 1 << 16
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uid_halves() -> dict[str, pl.Expr]:
    """`uid_hi`, `uid_lo`: bytes 0 to 7 and 8 to 15 of the uid, big-endian, UInt64. Ordered like the uid itself."""

    def half(start: int) -> pl.Expr:
        return pl.col("uid").bin.slice(start, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big")

    return {"uid_hi": half(0), "uid_lo": half(8)}


def uid_draws(hi: np.ndarray, lo: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n], spread evenly: mix(mix(mix(seed) ^ hi) ^ lo), with uint64 `hi`, `lo` of the uids.

    mix is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    Independent of `sample` and `split`, which take the uid's bytes as they are.
    """
    start = _mix(np.array([seed], np.uint64))
    out: np.ndarray = np.empty(len(hi), np.uint64)
    for begin in range(0, len(hi), _BLOCK):  # what lies between has a block's size
        part = slice(begin, begin + _BLOCK)
        out[part] = _mix(_mix(start ^ hi[part]) ^ lo[part])
    return out


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def as_share(draws: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): the upper 53 bits over 2**53."""
    return (draws >> np.uint64(11)).astype(np.float64) / 2.0**53
