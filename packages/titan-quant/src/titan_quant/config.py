"""The precision of a run as a configuration names it; torch-free.

Everything here is part of *what* is computed: another precision is another experiment.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from titan_quant.recipes import RECIPES, RecipeError, ScaleRounding, find_recipe

DType = Literal["bfloat16", "float32", "float64"]

_ROUNDINGS = get_args(ScaleRounding)
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
    """Which low-precision recipe computes the products of which layers."""

    recipe: str = "none"
    """Name of a recipe (`titan_quant.recipes.RECIPES`); `none` computes in the precision policy's param_dtype."""
    emulate: bool = False
    """Whether the recipe's arithmetic is computed in software, slowly and on any device, to test it."""
    roles: tuple[str, ...] = ("colwise", "rowwise")
    """Roles of the linear layers to convert, for a model that comes with roles; the head's is `head`."""
    include: tuple[str, ...] = ()
    """Names of further linear layers to convert, whatever their role; `*` stands for any characters."""
    exclude: tuple[str, ...] = ()
    """Names of layers and experts to leave alone; `*` stands for any characters."""
    experts: bool = False
    """Whether the products of experts are converted too, where the recipe has grouped ones."""
    skip_small: bool = True
    """Whether layers too small to gain are left alone, by what was measured on an H100."""
    scale_rounding: ScaleRounding = "rceil"
    """How mxfp8 rounds the scale of a block: `floor` and `rceil` on GPUs, `ceil` and `even` emulated only."""
    float8_gather: bool = field(default=False, metadata={"part": "how"})
    """Whether FSDP gathers weights as float8, which halves what it sends; float8_tensorwise only."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none.

        Whether the recipe runs on a device is not asked here: `titan_quant.recipes.resolve_recipe`.
        """
        try:
            recipe = find_recipe(self.recipe)
        except RecipeError as error:
            return [f"quant.recipe is {self.recipe!r}. {error}"]
        problems = []
        if self.scale_rounding not in _ROUNDINGS:
            problems.append(
                f"quant.scale_rounding is {self.scale_rounding!r}; it must be one of {', '.join(_ROUNDINGS)}."
            )
        elif self.scale_rounding != QuantConfig.scale_rounding and self.recipe != "mxfp8":
            problems.append(f"quant.scale_rounding is for the recipe mxfp8, not for {self.recipe}; leave it out.")
        elif self.scale_rounding in ("ceil", "even") and not self.emulate:
            problems.append(
                f"quant.scale_rounding {self.scale_rounding} has no kernel for GPUs; use rceil or floor, or "
                "quant.emulate."
            )
        if self.experts and not recipe.experts:
            able = ", ".join(name for name, other in RECIPES.items() if other.experts)
            problems.append(
                f"quant.experts: {self.recipe} has no products of experts; use one of {able}, or leave it out."
            )
        if self.float8_gather and not recipe.gathers_weights:
            able = ", ".join(name for name, other in RECIPES.items() if other.gathers_weights)
            problems.append(
                f"quant.float8_gather: {self.recipe} does not round a weight in the same way for all products, so "
                f"that it cannot be gathered rounded; use {able}, or leave it out."
            )
        if self.recipe == "none":
            given = [name for name in ("emulate", "include", "exclude") if getattr(self, name)]
            problems += [f"quant.{name} has no effect without a quant.recipe; leave it out." for name in given]
        return problems


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters: which linear layers get them. The rest of the model is frozen."""

    rank: int = 0
    """Rank of the adapters; 0: none, the whole model is trained."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    roles: tuple[str, ...] = ("colwise", "rowwise")
    """Roles of the linear layers that get adapters, for a model that comes with roles."""
    include: tuple[str, ...] = ()
    """Names of further linear layers that get adapters; `*` stands for any characters."""
    exclude: tuple[str, ...] = ()
    """Names of layers that get none; `*` stands for any characters."""

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        problems = []
        if self.rank < 0:
            problems.append(f"lora.rank is {self.rank}; it must be positive, or 0 for no adapters.")
        if self.alpha <= 0:
            problems.append(f"lora.alpha is {self.alpha}; it must be positive.")
        if self.rank == 0:
            given = [name for name in ("include", "exclude") if getattr(self, name)]
            problems += [f"lora.{name} has no effect without a lora.rank; give one or leave it out." for name in given]
        return problems


def _is_wider(dtype: str, other: str) -> bool:
    return _NARROW_TO_WIDE.index(dtype) > _NARROW_TO_WIDE.index(other)


def _wider(dtype: DType, other: DType) -> DType:
    return dtype if _is_wider(dtype, other) else other
