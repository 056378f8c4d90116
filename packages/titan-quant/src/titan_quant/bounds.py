"""How far a recipe's products may be from exact ones: the bound that its number formats imply, and nothing else.

Rounding `x`, scaled by 1 / s into the range of a format with p bits after the leading one and numbers a step d apart
near zero, and scaling back gives x + e with

    |e| <= u |x| + s d / 2,        u = 2**-(p + 1)

since the relative error of normal numbers is at most u (half a unit in the last place), and the absolute one of
subnormal numbers at most half a step. A value cut off at the largest number is off by at most the share c of itself
that lies above, so that max(u, c) stands for u where scales let that happen. Scales are computed in float32, which adds
a few times 2**-24 to u.

How large s can be follows from the largest magnitude a of what shares the scale, and from the format's largest number
M = m 2**q, 1 <= m < 2:

    float32 scales                 s = a / M
    powers of two                  s < 2 a / M        (the exact one, rounded up)
    e8m0 `rceil`                   s < 2 a / M
    e8m0 `ceil`                    s < 2 a / 2**q
    e8m0 `floor`                   s <= a / 2**q      c = (2 - m) / 2: a / s may come close to 2**(q + 1)
    e8m0 `even`                    s <= (1 + u) a / 2**q
                                   c = 1 - m / (2 - u'), u' = 2**-p / 2: from there on, a counts as the next power
    e4m3 (NVFP4)                   s <= max((1 + 2**-4) a / 6, 2**-6 A / 2688), A the operand's largest magnitude;
                                   c = 2**-4, smaller than u

For a product of K terms the errors of both operands, E and F, and of a sum in float32 add up to

    |result - A Bᵀ| <= |A| Fᵀ + E |B|ᵀ + E Fᵀ + 2 K 2**-24 (|A| + E) (|B| + F)ᵀ

element by element (the last term: N. Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Without underflow
the first three are at most (2 u + u²) |A| |B|ᵀ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_quant.formats import E4M3_LARGEST, E4M3_SMALLEST, FORMATS, TINY, Format
from titan_quant.recipes import Cast

_FLOAT32 = 2.0**-24
_SMALLEST_E8M0 = 2.0**-126


def rounding_bound(x: Tensor, cast: Cast) -> Tensor:
    """How far `x` [.., R, C] can be moved, element by element, by rounding it as `cast` says; float64."""
    form = FORMATS[cast.format]
    magnitude = x.double().abs()
    relative = max(2.0 ** -(form.mantissa + 1), _cut_off(form, cast)) + 8 * _FLOAT32
    return relative * magnitude + _largest_scale(magnitude, form, cast) * form.step / 2


def product_bound(a: Tensor, b: Tensor, casts: tuple[Cast, Cast] | None) -> Tensor:
    """How far the product of `a` [R, C] and `b` [S, C], rounded as `casts` say, can be from the exact one.

    Returns:
        [R, S] float64. Without casts, what is left is the error of a sum in float32.
    """
    a, b = a.double(), b.double()
    a_error = rounding_bound(a, casts[0]) if casts else torch.zeros_like(a)
    b_error = rounding_bound(b, casts[1]) if casts else torch.zeros_like(b)
    a, b = a.abs(), b.abs()
    summing = 2 * a.shape[-1] * _FLOAT32 * (a + a_error) @ (b + b_error).T
    return a @ b_error.T + a_error @ b.T + a_error @ b_error.T + summing


def _cut_off(form: Format, cast: Cast) -> float:
    if cast.scale != "e8m0" or cast.rounding in ("ceil", "rceil"):
        return 0.0
    leading = form.largest / 2.0**form.exponent
    beyond = 2.0 if cast.rounding == "floor" else 2.0 - 2.0**-form.mantissa / 2
    return 1.0 - leading / beyond


def _largest_scale(magnitude: Tensor, form: Format, cast: Cast) -> Tensor:
    """The most that each element's scale can be, as `magnitude`."""
    columns = magnitude.shape[-1]
    if cast.scope == "tensor":
        a = magnitude.amax()
    elif cast.scope == "row":
        a = magnitude.amax(-1, keepdim=True)
    else:
        blocks = F.pad(magnitude, (0, -columns % cast.block)).unflatten(-1, (-1, cast.block))
        a = blocks.amax(-1).repeat_interleave(cast.block, -1)[..., :columns]
    if cast.scale == "e4m3":
        whole = magnitude.amax().clamp(min=TINY) / (E4M3_LARGEST * form.largest)
        return torch.maximum((1 + 2.0**-4) * a / form.largest, E4M3_SMALLEST * whole)
    if cast.scale == "e8m0":
        power = 2.0**form.exponent
        factor = {
            "rceil": 2 / form.largest,
            "ceil": 2 / power,
            "floor": 1 / power,
            "even": (1 + 2.0 ** -(form.mantissa + 1)) / power,
        }[cast.rounding]
        return (a * factor).clamp(min=_SMALLEST_E8M0)
    return a.clamp(min=TINY) * (2.0 if cast.scale == "power_of_two" else 1.0) / form.largest
