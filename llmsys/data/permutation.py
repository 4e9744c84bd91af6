"""A shuffle that is a formula: where an index goes follows from the seed alone, with no list in memory."""

import hashlib
import math

ROUNDS = 8
MASK = (1 << 64) - 1


class Permutation:
    """A bijection of range(size), chosen by `seed` and `epoch`; `permutation[i]` costs microseconds and no memory.

    `size` is laid out as a rectangle of two nearly equal sides; in turn, each coordinate is shifted by a keyed hash of
    the other, and a point that leaves the range walks on until it is back in.

    Source  Black & Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3; the hash is the finaliser of
            SplitMix64 (Steele, Lea & Flood 2014)
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self.rows = max(1, math.isqrt(size))
        self.columns = -(-size // self.rows)
        digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self.keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        while True:
            row, column = divmod(index, self.columns)
            for i in range(0, ROUNDS, 2):
                row = (row + _mix(column + self.keys[i])) % self.rows
                column = (column + _mix(row + self.keys[i + 1])) % self.columns
            index = row * self.columns + column
            if index < self.size:
                return index


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
