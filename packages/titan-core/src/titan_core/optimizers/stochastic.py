"""Stochastic rounding to bfloat16 whose draws do not depend on the layout.

A number is rounded up with the probability that its distance from the lower neighbour has in units of their gap, so on
average nothing is lost, however small an update is beside what it is added to (Gupta et al., arXiv 1502.02551). The
draw of an element is a function of (seed, step, parameter's name, purpose, place in the whole parameter): a hash of its
place, keyed by a hash of the rest. A rank computes those of its own elements, in any order.
"""

import hashlib

import torch
from torch import Tensor

from titan_core.optimizers.blocks import row_numbers
from titan_core.shards import owned

_LOW = 0xFFFF


class Draws:
    """32 random bits for each element of this rank's part of a parameter."""

    def __init__(self, parameter: Tensor, seed: int, step: int, name: str, purpose: str) -> None:
        """`purpose` tells apart what is drawn for the same parameter in the same step."""
        digest = hashlib.sha256(f"{seed}:{step}:{purpose}:{name}".encode()).digest()
        first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
        rows = row_numbers(parameter).to(torch.int32)[:, None]
        self._first, self._second = _mixed(rows ^ first), _mixed(rows ^ second)
        own = owned(parameter)[-1] if parameter.ndim else slice(0, 1)
        columns = torch.arange(own.start, own.stop, device=parameter.device)
        self._columns = (columns * 0x9E3779B9).to(torch.int32)  # apart by 2^32 over the golden ratio

    def bits(self, rows: slice) -> Tensor:
        """Those of some of the rows: int32 [rows, columns]."""
        return _mixed(self._columns + self._first[rows], self._second[rows])


def _mixed(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A bijection of int32, one for each `key`, in which each bit of `x` changes about half of all; overwrites `x`.

    Without a key that named lowbias32 by Wellons, "Prospecting for hash functions", 2018,
    https://nullprogram.com/blog/2018/07/31/.
    """
    _xor_shifted(x, 16).mul_(0x7FEB352D).bitwise_xor_(key)
    _xor_shifted(x, 15).mul_(0x846CA68B - 2**32)
    return _xor_shifted(x, 16)


def _xor_shifted(x: Tensor, bits: int) -> Tensor:
    # Shifting copies the sign in, which the mask takes out.
    return x.bitwise_xor_((x >> bits).bitwise_and_(2 ** (32 - bits) - 1))


def low_half(bits: Tensor) -> Tensor:
    """16 of 32 random bits, as int32 that may be overwritten."""
    return bits & _LOW


def high_half(bits: Tensor) -> Tensor:
    """The other 16; `bits` is overwritten."""
    return bits.bitwise_right_shift_(16).bitwise_and_(_LOW)


def round_stochastically(x: Tensor, draws: Tensor) -> Tensor:
    """`x` in bfloat16, rounded up or down by `draws`: int32 of its shape, evenly among 0 to 65,535, overwritten.

    A float32 has 16 bits more than a bfloat16: the sum carries into the last that is kept as often as it should. What
    is infinite or not a number stays so.
    """
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    return draws.add_(bits).bitwise_and_(~_LOW).view(torch.float32).to(torch.bfloat16)
