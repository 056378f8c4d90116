"""The low-precision recipes that titan-quant knows, what each of them needs, and the refusal of what cannot run.

A recipe says to which number formats the operands of a linear layer's three matrix products are rounded, and how
they are scaled first. All are registered, so that a configuration can name them and a refusal can explain itself;
`available` says whether this version computes them. Torch-free.

Hardware facts: float8 products need compute capability 8.9 (PyTorch's `scaled_mm`; its rowwise kernel has paths for
8.9 and for 9.x to 12.x). Those with block scales (OCP Microscaling MXFP8, NVIDIA's NVFP4) need data-centre Blackwell,
10.x. A higher number is no superset: the GeForce cards of that generation, 12.x, lack the instructions.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

_ANY_LATER = 1_000


class RecipeError(ValueError):
    """A recipe that does not exist, or that cannot run here."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe does and needs."""

    summary: str
    """One sentence for a person choosing."""
    forward_format: str | None = None
    """Number format of activations and weights, by torch's name; None: the layer's own dtype."""
    gradient_format: str | None = None
    """Likewise, of the gradients of a layer's outputs."""
    capability: tuple[int, int] | None = None
    """Lowest NVIDIA compute capability; None: any device."""
    last_major: int = _ANY_LATER
    """Highest major compute capability that has the instructions."""
    simpler: str = "none"
    """The recipe to try where this one cannot run."""
    available: bool = False
    """Whether this version of titan-quant computes it."""
    emulated: bool = False
    """Whether this version can compute it in software on any device."""

    def runs_on(self, device_capability: tuple[int, int] | None) -> bool:
        """Whether this version computes it on an NVIDIA GPU of this capability (None: on any other device)."""
        return self.available and (self.emulated or self.lacks(device_capability) is None)

    def lacks(self, device_capability: tuple[int, int] | None) -> str | None:
        """The hardware that it needs and the device is not, in words; None if the device will do."""
        if self.capability is None:
            return None
        if device_capability and self.capability <= device_capability < (self.last_major + 1, 0):
            return None
        upper = "or higher" if self.last_major == _ANY_LATER else f"to {self.last_major}.x"
        return "an NVIDIA GPU of compute capability {}.{} {}".format(*self.capability, upper)


RECIPES: Mapping[str, Recipe] = {
    "none": Recipe(
        summary="No quantization: matrix products in the precision policy's param_dtype.",
        available=True,
    ),
    "float8_tensorwise": Recipe(
        summary="One scale a tensor: the fastest float8, and the one whose weights can be gathered in float8.",
        forward_format="float8_e4m3fn",
        gradient_format="float8_e5m2",
        capability=(8, 9),
    ),
    "float8_rowwise": Recipe(
        summary="One power-of-two scale a row: an outlier costs the precision of its own row only.",
        forward_format="float8_e4m3fn",
        gradient_format="float8_e4m3fn",
        capability=(8, 9),
        simpler="float8_tensorwise",
    ),
    "float8_rowwise_with_gw_hp": Recipe(
        summary="Rowwise, but weight gradients are computed in high precision: the most accurate float8.",
        forward_format="float8_e4m3fn",
        gradient_format="float8_e4m3fn",
        capability=(8, 9),
        simpler="float8_rowwise",
    ),
    "mxfp8": Recipe(
        summary="OCP Microscaling: a power-of-two scale for each block of 32 values.",
        forward_format="float8_e4m3fn",
        gradient_format="float8_e4m3fn",
        capability=(10, 0),
        last_major=10,
        simpler="float8_rowwise",
    ),
    "nvfp4": Recipe(
        summary="Four bits a value, with a float8 scale for each block of 16 and one a tensor (experimental).",
        forward_format="float4_e2m1fn_x2",
        gradient_format="float4_e2m1fn_x2",
        capability=(10, 0),
        last_major=10,
        simpler="mxfp8",
    ),
}


def find_recipe(name: str, recipes: Mapping[str, Recipe] = RECIPES) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: if there is none; suggests the nearest name.
    """
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=1)
    raise RecipeError(
        f"There is no recipe {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} The recipes are "
        f"{', '.join(recipes)}. Training in bfloat16 is none of them: it is the precision policy's param_dtype."
    )


def resolve_recipe(
    name: str,
    device_capability: tuple[int, int] | None,
    device_type: str,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> Recipe:
    """The recipe of that name, if this version computes it on this device.

    Args:
        name: a key of `recipes`.
        device_capability: the GPU's NVIDIA compute capability (`titan_quant.device.nvidia_capability`), else None.
        device_type: `cpu` or `cuda`, for the message.
        recipes: the registry; its `none` must run everywhere.

    Raises:
        RecipeError: if there is no such recipe, if it is not built, or if the hardware lacks it; says all that is
            missing and names the nearest recipe that would run.
    """
    recipe = find_recipe(name, recipes)
    if recipe.runs_on(device_capability):
        return recipe
    reasons = []
    if not recipe.available:
        reasons.append("it is registered, but its arithmetic is not built in this version of titan-quant")
    if hardware := recipe.lacks(device_capability):
        capability = " of capability {}.{}".format(*device_capability) if device_capability else ""
        reasons.append(f"it needs {hardware}, and this is a {device_type} device{capability}")
    nearest = recipe.simpler
    while not recipes[nearest].runs_on(device_capability):
        nearest = recipes[nearest].simpler
    raise RecipeError(
        f"The recipe {name!r} cannot be used: {'; '.join(reasons)}. The nearest one that runs here is {nearest!r}."
    )
