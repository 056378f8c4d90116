"""How a decoder is built from its shape: the roles of its modules, its initial weights. Imports no torch of its own.

A family (see `titan_models.families.llama3`) subclasses `DecoderConfig` and adds presets, roles and key maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_models.shape import DecoderShape, ModelConfigError

if TYPE_CHECKING:
    from titan_models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(DecoderShape):
    """A decoder-only transformer that can be built; the defaults are a toy."""

    def build(self) -> "Decoder":
        """The model, uninitialised, on the current default device (use `torch.device("meta")` for no memory).

        Raises:
            ModelConfigError: if `problems()` is not empty.
        """
        if problems := self.problems():
            raise ModelConfigError("This model cannot be built. " + " ".join(problems))
        from titan_models.decoder import Decoder

        return Decoder(self)

    def roles(self) -> Mapping[str, str]:
        """FQN pattern of a module -> its role; `*` stands for one part between dots. Each fits at least one module."""
        missing = []
        if not self.qk_norm:
            missing += ["layers.*.attention.q_norm", "layers.*.attention.k_norm"]
        if self.moe is None:
            missing.append("layers.*.moe.")
        elif not self.moe.shared_hidden_dim:
            missing.append("layers.*.moe.shared")
        if self.has_experts(0):
            missing.append("layers.*.feed_forward")
        return {fqn: role for fqn, role in DECODER_ROLES.items() if not fqn.startswith(tuple(missing))}

    def costly_operators(self) -> tuple[str, ...]:
        """The model's own operators whose results are cheaper to keep than to compute again."""
        kernel = ("torch_attn._varlen_attn.default",) if self.attention_kernel == "varlen" else ()
        return kernel if self.moe is None else (*kernel, "titan_models.expert_products.default")

    def init_rules(self) -> Mapping[str, tuple[str, float]]:
        """FQN pattern of a parameter or buffer -> ("normal", standard deviation) or ("constant", value)."""
        reading = ("normal", self.init_std)
        writing = ("normal", self.init_std / (2 * self.layers) ** 0.5)
        ones = ("constant", 1.0)
        weights = {
            "norm": ones,
            "head_norm": ones,
            "embedding": reading,
            "colwise": reading,
            "rowwise": writing,
            "gate": reading,
            "head": reading,
        }
        rules = {f"{fqn}.weight": weights[role] for fqn, role in self.roles().items() if role in weights}
        if self.moe is not None:
            rules |= {
                "layers.*.moe.experts.w1": reading,
                "layers.*.moe.experts.w3": reading,
                "layers.*.moe.experts.w2": writing,
                "layers.*.moe.router.bias": ("constant", 0.0),
                "layers.*.moe.router.load": ("constant", 0.0),
            }
        return rules


DECODER_ROLES: Mapping[str, str] = {
    "tok_embeddings": "embedding",
    "layers.*": "block",
    "layers.*.attention_norm": "norm",
    "layers.*.attention": "region",
    "layers.*.attention.wq": "colwise",
    "layers.*.attention.wk": "colwise",
    "layers.*.attention.wv": "colwise",
    "layers.*.attention.q_norm": "head_norm",
    "layers.*.attention.k_norm": "head_norm",
    "layers.*.attention.sdpa": "attention",
    "layers.*.attention.wo": "rowwise",
    "layers.*.ffn_norm": "norm",
    "layers.*.feed_forward": "region",
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
    "layers.*.moe.router": "router",
    "layers.*.moe.router.gate": "gate",
    "layers.*.moe.experts": "experts",
    "layers.*.moe.shared": "region",
    "layers.*.moe.shared.w1": "colwise",
    "layers.*.moe.shared.w3": "colwise",
    "layers.*.moe.shared.w2": "rowwise",
    "norm": "norm",
    "lm_head": "head",
}
"""Every module that a decoder may have, and its role; `DecoderConfig.roles` leaves out what a model does not have."""
