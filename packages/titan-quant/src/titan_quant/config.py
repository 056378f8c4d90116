"""The precision of a run as a configuration names it; torch-free.

Everything here is part of *what* is computed: another precision is another experiment.
"""

from dataclasses import dataclass, fields
from typing import Literal

from titan_quant.recipes import RecipeError, find_recipe

DType = Literal["bfloat16", "float32", "float64"]

_NARROW_TO_WIDE = ("bfloat16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The dtypes that training keeps, computes and communicates in.

    Weights are kept in `master_dtype`, cast to `param_dtype` for computing, and their gradients are summed over
    micro-batches and ranks in `reduce_dtype`.
    """

    master_dtype: DType = "float32"
    """Dtype of the weights that the optimizer updates, of their gradients and of the optimizer's states."""
    param_dtype: DType | None = None
    """Dtype that weights are cast to for forward and backward; None: master_dtype."""
    reduce_dtype: DType | None = None
    """Dtype that gradients are accumulated and reduced in; None: param_dtype, or float32 if that is narrower."""

    def resolved(self) -> tuple[DType, DType, DType]:
        """The names of the master, param and reduce dtype, defaults filled in.

        Raises:
            ValueError: if the policy has problems; all are listed.
        """
        if problems := self.problems():
            raise ValueError("This precision policy cannot be used. " + " ".join(problems))
        param = self.param_dtype or self.master_dtype
        return self.master_dtype, param, self.reduce_dtype or _wider(param, "float32")

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none.

        `param_dtype` must not be wider than `master_dtype`, since the cast would cost memory and add nothing, nor
        than `reduce_dtype`, since gradients would then be rounded before they are summed. A `reduce_dtype` wider
        than `master_dtype` is fine: the sum is rounded once, when it is whole.
        """
        problems = [
            f"precision.{field.name} is {value!r}; it must be one of {', '.join(_NARROW_TO_WIDE)}."
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (*_NARROW_TO_WIDE, field.default)
        ]
        if problems:
            return problems
        param = self.param_dtype or self.master_dtype
        if _is_wider(param, self.master_dtype):
            problems.append(
                f"precision.param_dtype is {param}, wider than master_dtype, which is {self.master_dtype}; choose "
                f"{self.master_dtype} or narrower, or a wider master_dtype."
            )
        if self.reduce_dtype is not None and _is_wider(param, self.reduce_dtype):
            problems.append(
                f"precision.reduce_dtype is {self.reduce_dtype}, narrower than param_dtype, which is {param}, so that "
                f"gradients would be rounded before they are summed; choose {param} or wider."
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which low-precision recipe the linear layers compute with."""

    recipe: str = "none"
    """Name of a recipe (`titan_quant.recipes.RECIPES`); `none` computes in the precision policy's param_dtype."""

    def problems(self) -> list[str]:
        """What is wrong with the recipe's name, as one sentence; empty if nothing is.

        Whether the recipe runs on a device is not asked here: `titan_quant.recipes.resolve_recipe`.
        """
        try:
            find_recipe(self.recipe)
        except RecipeError as error:
            return [f"quant.recipe is {self.recipe!r}. {error}"]
        return []


def _is_wider(dtype: str, other: str) -> bool:
    return _NARROW_TO_WIDE.index(dtype) > _NARROW_TO_WIDE.index(other)


def _wider(dtype: DType, other: DType) -> DType:
    return dtype if _is_wider(dtype, other) else other
