"""What every decoder family's configuration has in common. Imports no torch: a login node can read it.

A family (see `titan_models.families.llama3`) subclasses `DecoderConfig` and adds presets, roles and key maps.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_models.decoder import Decoder


class ModelConfigError(ValueError):
    """The fields of a model configuration contradict each other; the message lists every contradiction."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary frequencies to contexts longer than those trained on."""

    factor: float = 8.0
    """By how much wavelengths longer than the original context are stretched."""
    low_frequency_factor: float = 1.0
    """Wavelengths above `original_context / low_frequency_factor` tokens are stretched fully."""
    high_frequency_factor: float = 4.0
    """Wavelengths below `original_context / high_frequency_factor` tokens stay as they are."""
    original_context: int = 8192
    """Context in tokens that the unstretched frequencies were trained on."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes and constants of a decoder-only transformer; the defaults are a toy."""

    vocab_size: int = 4096
    """Rows of the embedding and of the head: the tokens the model knows."""
    dim: int = 256
    """D: width of the hidden states."""
    layers: int = 6
    """Number of transformer blocks."""
    heads: int = 8
    """N: query heads an attention layer."""
    kv_heads: int = 4
    """Key and value heads; each serves heads / kv_heads query heads (grouped-query attention)."""
    head_dim: int = 32
    """H: width of one head."""
    hidden_dim: int = 768
    """Width of the feed-forward layer."""
    norm_eps: float = 1e-5
    """Added to the mean square before the root in RMSNorm."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Frequency scaling for long contexts; None leaves the frequencies as they are."""
    tie_embeddings: bool = False
    """Whether the head shares the embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; layers that write to the residual stream get it divided by
    sqrt(2 * layers)."""
    loss_chunk_tokens: int | None = field(default=None, metadata={"part": "how"})
    """Tokens whose logits exist at one time while the loss is computed; None: what suits the device."""

    def problems(self) -> list[str]:
        """Every contradiction between the fields, each as one sentence with a remedy; empty if there is none."""
        problems = [
            f"model.{f.name} is {value}; it must be at least 1."
            for f in dataclasses.fields(self)
            if type(value := getattr(self, f.name)) is int and value < 1
        ]
        if not problems and self.heads % self.kv_heads:
            problems.append(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}; every key head "
                "serves the same number of query heads."
            )
        if self.head_dim % 2:
            problems.append(f"model.head_dim {self.head_dim} is odd; rotary embeddings turn pairs of dimensions.")
        return problems

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
        """FQN pattern of a module -> its role; `*` stands for one part between dots."""
        return DECODER_ROLES

    def init_rules(self) -> Mapping[str, tuple[str, float]]:
        """FQN pattern of a parameter -> ("normal", standard deviation) or ("constant", value)."""
        by_role = {
            "norm": ("constant", 1.0),
            "embedding": ("normal", self.init_std),
            "colwise": ("normal", self.init_std),
            "rowwise": ("normal", self.init_std / (2 * self.layers) ** 0.5),
            "head": ("normal", self.init_std),
        }
        return {f"{fqn}.weight": by_role[role] for fqn, role in self.roles().items() if role in by_role}


DECODER_ROLES: Mapping[str, str] = {
    "tok_embeddings": "embedding",
    "layers.*": "block",
    "layers.*.attention_norm": "norm",
    "layers.*.attention.wq": "colwise",
    "layers.*.attention.wk": "colwise",
    "layers.*.attention.wv": "colwise",
    "layers.*.attention.sdpa": "attention",
    "layers.*.attention.wo": "rowwise",
    "layers.*.ffn_norm": "norm",
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
    "norm": "norm",
    "lm_head": "head",
}
