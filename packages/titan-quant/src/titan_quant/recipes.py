"""The low-precision recipes: to what each rounds, what each needs, and the refusal of what cannot run.

A linear layer computes three matrix products. Each is written with the dimension that is summed over last in both
operands, since scales run along it:

    output      = activation [T, K] @ (weight [N, K])ᵀ
    grad_input  = gradient [T, N] @ (weightᵀ [K, N])ᵀ
    grad_weight = gradientᵀ [N, T] @ (activationᵀ [K, T])ᵀ

A recipe names, for both operands of each product, the number format that they are rounded to and the scales that are
taken out first; a product without names is computed as it is. Torch-free.

Hardware facts: float8 products need compute capability 8.9 (PyTorch's `scaled_mm`; its rowwise kernel has paths for
8.9 and for 9.x to 12.x). Those with block scales (OCP Microscaling MXFP8, NVIDIA's NVFP4) need data-centre Blackwell,
10.x. A higher number is no superset: the GeForce cards of that generation, 12.x, lack the instructions.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

ScaleRounding = Literal["floor", "rceil", "ceil", "even"]
Product = Literal["output", "grad_input", "grad_weight"]
Operand = Literal["activation", "weight", "gradient"]

OPERANDS: Mapping[Product, tuple[Operand, Operand]] = {
    "output": ("activation", "weight"),
    "grad_input": ("gradient", "weight"),
    "grad_weight": ("gradient", "activation"),
}

_ANY_LATER = 1_000
_ANY_SIZE = 1 << 62


class RecipeError(ValueError):
    """A recipe that does not exist, that cannot run here, or that a model gives nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    """How one operand of a product is rounded."""

    format: Literal["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"]
    """Number format, by torch's name."""
    scope: Literal["tensor", "row", "block"]
    """What shares a scale: the whole operand, a row, or `block` consecutive values of a row."""
    scale: Literal["float32", "power_of_two", "e8m0", "e4m3"]
    """Numbers that a scale may be; `e4m3` scales have one of float32 for the whole operand above them."""
    block: int = 0
    """Values that share a scale, if `scope` is block."""
    rounding: ScaleRounding = "rceil"
    """How an e8m0 scale follows from the largest value of its block; see `titan_quant.formats`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe does and needs."""

    summary: str
    """One sentence for a person choosing."""
    output: tuple[Cast, Cast] | None = None
    """Casts of activation and weight; None: not rounded."""
    grad_input: tuple[Cast, Cast] | None = None
    """Casts of gradient and weight."""
    grad_weight: tuple[Cast, Cast] | None = None
    """Casts of gradient and activation."""
    experts: bool = False
    """Whether it has grouped products, for experts."""
    gathers_weights: bool = False
    """Whether FSDP can gather weights that are rounded already."""
    multiple: int = 1
    """What the features of a layer, in and out, must be multiples of."""
    too_small: tuple[tuple[int, int], ...] = ()
    """Layers with at most this many (out, in) features run slower than in bfloat16."""
    capability: tuple[int, int] | None = None
    """Lowest NVIDIA compute capability; None: any device."""
    last_major: int = _ANY_LATER
    """Highest major compute capability that has the instructions."""
    simpler: str = "none"
    """The recipe to try where this one cannot run."""

    def casts(self, product: Product) -> tuple[Cast, Cast] | None:
        """Casts of both operands of `product`, in the order of `OPERANDS`."""
        return getattr(self, product)

    def rounding(self, product: Product) -> tuple[Cast, Cast]:
        """The same of a product that is known to be rounded.

        Raises:
            RecipeError: if it is not.
        """
        casts = self.casts(product)
        if casts is None:
            raise RecipeError(f"The {product} of a layer is not rounded by this recipe: {self.summary}")
        return casts

    def with_rounding(self, rounding: ScaleRounding) -> "Recipe":
        """The same recipe with e8m0 scales rounded in this way."""

        def changed(casts: tuple[Cast, Cast] | None) -> tuple[Cast, Cast] | None:
            return casts and (replace(casts[0], rounding=rounding), replace(casts[1], rounding=rounding))

        return replace(
            self,
            output=changed(self.output),
            grad_input=changed(self.grad_input),
            grad_weight=changed(self.grad_weight),
        )

    def token_scales(self) -> dict[Product, str]:
        """For each product which of its scales span tokens: results then depend on what shares a micro-batch."""
        spans: dict[Product, str] = {}
        for product, operands in OPERANDS.items():
            spans[product] = "none"
            for operand, cast in zip(operands, self.casts(product) or (), strict=False):
                if operand != "weight" and (cast.scope == "tensor" or cast.scale == "e4m3"):
                    spans[product] = "the micro-batch"
                elif product == "grad_weight":
                    spans[product] = "the micro-batch" if cast.scope == "row" else f"{cast.block} tokens"
        return spans

    def lacks(self, device_capability: tuple[int, int] | None) -> str | None:
        """The hardware that it needs and the device is not, in words; None if the device will do.

        `device_capability` is an NVIDIA GPU's; None: any other device.
        """
        if self.capability is None:
            return None
        if device_capability and self.capability <= device_capability < (self.last_major + 1, 0):
            return None
        upper = "or higher" if self.last_major == _ANY_LATER else f"to {self.last_major}.x"
        return "an NVIDIA GPU of compute capability {}.{} {}".format(*self.capability, upper)


_E4M3_TENSOR = Cast(format="float8_e4m3fn", scope="tensor", scale="float32")
_E5M2_TENSOR = Cast(format="float8_e5m2", scope="tensor", scale="float32")
_E4M3_ROW = Cast(format="float8_e4m3fn", scope="row", scale="power_of_two")
_E4M3_TENSOR_POWER = Cast(format="float8_e4m3fn", scope="tensor", scale="power_of_two")
_MXFP8 = Cast(format="float8_e4m3fn", scope="block", scale="e8m0", block=32)
_NVFP4 = Cast(format="float4_e2m1fn_x2", scope="block", scale="e4m3", block=16)

# What torchao measured on an H100 (its automatic filters): below, casting costs more than the product gains.
_SMALL_FOR_TENSORWISE = ((1024, 4096),)
_SMALL_FOR_OTHERS = ((2048, _ANY_SIZE), (_ANY_SIZE, 1024), (4096, 2048))

RECIPES: Mapping[str, Recipe] = {
    "none": Recipe(summary="No quantization: matrix products in the precision policy's param_dtype."),
    "float8_tensorwise": Recipe(
        summary="One scale a tensor: the fastest float8, and the one whose weights can be gathered in float8.",
        output=(_E4M3_TENSOR, _E4M3_TENSOR),
        grad_input=(_E5M2_TENSOR, _E4M3_TENSOR),
        grad_weight=(_E5M2_TENSOR, _E4M3_TENSOR),
        gathers_weights=True,
        multiple=16,
        too_small=_SMALL_FOR_TENSORWISE,
        capability=(8, 9),
    ),
    "float8_rowwise": Recipe(
        summary="One power-of-two scale a row: an outlier costs the precision of its own row only.",
        output=(_E4M3_ROW, _E4M3_ROW),
        grad_input=(_E4M3_ROW, _E4M3_ROW),
        grad_weight=(_E4M3_ROW, _E4M3_ROW),
        experts=True,
        multiple=16,
        too_small=_SMALL_FOR_OTHERS,
        capability=(8, 9),
        simpler="float8_tensorwise",
    ),
    "float8_rowwise_with_gw_hp": Recipe(
        summary="Rowwise, but weight gradients are computed in high precision: the most accurate float8.",
        output=(_E4M3_ROW, _E4M3_ROW),
        grad_input=(_E4M3_ROW, _E4M3_TENSOR_POWER),
        multiple=16,
        too_small=_SMALL_FOR_OTHERS,
        capability=(8, 9),
        simpler="float8_rowwise",
    ),
    "mxfp8": Recipe(
        summary="OCP Microscaling: a power-of-two scale for each block of 32 values.",
        output=(_MXFP8, _MXFP8),
        grad_input=(_MXFP8, _MXFP8),
        grad_weight=(_MXFP8, _MXFP8),
        experts=True,
        multiple=32,
        too_small=_SMALL_FOR_OTHERS,
        capability=(10, 0),
        last_major=10,
        simpler="float8_rowwise",
    ),
    "nvfp4": Recipe(
        summary="Four bits a value, with a float8 scale for each block of 16 and one a tensor (experimental).",
        output=(_NVFP4, _NVFP4),
        grad_input=(_NVFP4, _NVFP4),
        grad_weight=(_NVFP4, _NVFP4),
        multiple=32,
        too_small=_SMALL_FOR_OTHERS,
        capability=(10, 0),
        last_major=10,
        simpler="mxfp8",
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: if there is none; suggests the nearest name.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    raise RecipeError(
        f"There is no recipe {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} The recipes are "
        f"{', '.join(RECIPES)}. Training in bfloat16 is none of them: it is the precision policy's param_dtype."
    )


def resolve_recipe(
    name: str, device_capability: tuple[int, int] | None, device_type: str, *, emulate: bool = False
) -> Recipe:
    """The recipe of that name, if it runs on this device.

    Args:
        name: a key of `RECIPES`.
        device_capability: the GPU's NVIDIA compute capability (`titan_quant.device.nvidia_capability`), else None.
        device_type: `cpu` or `cuda`, for the message.
        emulate: whether it is computed in software, which every device can.

    Raises:
        RecipeError: if there is no such recipe, or if the hardware lacks it; says what is missing and names the
            nearest recipe that would run.
    """
    recipe = find_recipe(name)
    lacking = None if emulate else recipe.lacks(device_capability)
    if lacking is None:
        return recipe
    capability = " of capability {}.{}".format(*device_capability) if device_capability else ""
    nearest = recipe.simpler
    while RECIPES[nearest].lacks(device_capability):
        nearest = RECIPES[nearest].simpler
    raise RecipeError(
        f"The recipe {name!r} cannot be used: it needs {lacking}, and this is a {device_type} device{capability}. "
        f"The nearest one that runs here is {nearest!r}; with quant.emulate, which computes {name!r} slowly in "
        "software to test it, any device will do."
    )
