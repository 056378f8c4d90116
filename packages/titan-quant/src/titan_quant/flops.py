"""Which share of a run's FLOPs is computed in which precision, for a utilisation against the mixed peak; torch-free."""

from collections.abc import Collection, Mapping

from titan_quant.recipes import OPERANDS, Recipe

HIGH = "high"  # the precision policy's param_dtype


def flops_by_precision(forward: Mapping[str, float], converted: Collection[str], recipe: Recipe) -> dict[str, float]:
    """The share of FLOPs, forward and backward, in `high` precision, `float8` and `float4`; they add up to 1.

    Each module's backward is counted as twice its forward: for a layer's weights these are the other two products,
    which a recipe may compute in another precision.

    Args:
        forward: FQN -> FLOPs of the forward pass, in any unit, of every module that has some.
        converted: FQNs of the layers and experts that compute in `recipe` (`titan_quant.convert.Conversion`).
        recipe: their recipe.

    Raises:
        ValueError: if `forward` lacks a module of `converted`, or has no FLOPs at all.
    """
    if missing := sorted(set(converted) - forward.keys()):
        raise ValueError(f"The FLOPs of {', '.join(missing)} are not given, so their share cannot be told.")
    total = sum(forward.values())
    if total <= 0:
        raise ValueError("No module has FLOPs, so that none can have a share of them.")
    shares = {HIGH: 0.0}
    quantized = sum(forward[fqn] for fqn in converted) / total
    for product in OPERANDS:
        casts = recipe.casts(product)
        precision = casts[0].format.partition("_")[0] if casts else HIGH
        shares[precision] = shares.get(precision, 0.0) + quantized / 3
        shares[HIGH] += (1 - quantized) / 3
    return {precision: share for precision, share in shares.items() if share}
