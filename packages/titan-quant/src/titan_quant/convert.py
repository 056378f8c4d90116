"""Converting a model to a low-precision recipe, before anything lays it out.

Call it when the model is built, on the meta device or not, and whole: whether a layer is converted follows from its
whole size, never from a shard's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from titan_quant.arithmetic import Arithmetic
from titan_quant.config import QuantConfig
from titan_quant.device import nvidia_capability
from titan_quant.grouped import convert_experts
from titan_quant.linear import convert_linear
from titan_quant.recipes import Recipe, RecipeError, resolve_recipe
from titan_quant.select import fits, select_linears


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `quantize` did to a model."""

    recipe: Recipe
    linears: tuple[str, ...] = ()
    """FQNs of the linear layers that were converted."""
    experts: tuple[str, ...] = ()
    """FQNs of the modules of experts that were converted."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """FQN -> why it was left alone, of the other linear layers and modules of experts."""

    def lines(self) -> list[str]:
        """What was converted and what was not, for a person: equal layers are counted, not listed."""
        lines = [f"converted: {names}" for names in _counted([*self.linears, *self.experts])]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [fqn for fqn, own in self.skipped.items() if own == reason]
            lines += [f"left alone ({reason}): {line}" for line in _counted(names)]
        return lines


def quantize(
    model: nn.Module,
    config: QuantConfig,
    roles: Mapping[str, str] | None = None,
) -> Conversion:
    """Lets layers of `model` compute in the arithmetic of `config.recipe`; names and parameters stay as they are.

    Args:
        model: any module; its linear layers are `nn.Linear`, its experts `titan_quant.grouped.GroupedExperts`.
        config: which recipe, and for which layers.
        roles: FQN -> role; without them every linear layer but the head is converted.

    Raises:
        ValueError: if `config` has problems; all are listed.
        RecipeError: if the device that the model is on lacks what the recipe needs (for a model on the meta device
            `resolve_recipe` asks that of the device it is meant for), or if no layer can be converted.
        SelectionError: if a name in `config` fits nothing.
    """
    if problems := config.problems():
        raise ValueError("This model cannot be quantized. " + " ".join(problems))
    device = next((parameter.device.type for parameter in model.parameters()), "meta")
    recipe = resolve_recipe(
        config.recipe,
        nvidia_capability(device),
        device,
        emulate=config.emulate or device == "meta",
    ).with_rounding(config.scale_rounding)
    if recipe.output is None:
        return Conversion(recipe=recipe)
    arithmetic = Arithmetic(recipe, config.emulate)
    chosen, skipped = select_linears(
        model, roles, wanted=config.roles, include=config.include, exclude=config.exclude, option="quant"
    )
    linears = []
    for fqn, module in chosen.items():
        if reason := _unfit(recipe, tuple(module.weight.shape), config.skip_small):
            skipped[fqn] = reason
        else:
            convert_linear(module, arithmetic)
            linears.append(fqn)
    experts = []
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for fqn, module in modules:
        if not hasattr(module, "grouped_product"):
            continue
        if reason := _unfit_experts(recipe, module, fqn, config):
            skipped[fqn] = reason
        else:
            convert_experts(module, arithmetic)
            experts.append(fqn)
    conversion = Conversion(recipe=recipe, linears=tuple(linears), experts=tuple(experts), skipped=skipped)
    if not linears and not experts:
        why = "; ".join(conversion.lines()) or "it has no linear layers"
        raise RecipeError(
            f"The recipe {config.recipe!r} has nothing to do in this model: {why}. Convert small layers too with "
            "quant.skip_small false, name other layers in quant.roles or quant.include, or use the recipe 'none'."
        )
    return conversion


def _unfit(recipe: Recipe, shape: tuple[int, ...], skip_small: bool) -> str | None:
    """Why a weight of `shape` [.., N, K] is left alone, or None."""
    rows, columns = shape[-2:]
    if rows % recipe.multiple or columns % recipe.multiple:
        return f"its {columns} -> {rows} features are not multiples of {recipe.multiple}"
    if skip_small and any(rows <= out and columns <= into for out, into in recipe.too_small):
        return f"too small to gain: {columns} -> {rows} features"
    return None


def _unfit_experts(recipe: Recipe, module: nn.Module, fqn: str, config: QuantConfig) -> str | None:
    if not config.experts:
        return "experts, and quant.experts is not set"
    if fits(fqn, config.exclude):
        return "excluded by name"
    shapes = {tuple(parameter.shape) for parameter in module.parameters(recurse=False)}
    reasons = (_unfit(recipe, shape, config.skip_small) for shape in shapes if len(shape) == 3)
    return next(filter(None, reasons), None)


def _counted(names: list[str]) -> list[str]:
    """Names that differ in numbers only as one, with how many there are."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items()]
