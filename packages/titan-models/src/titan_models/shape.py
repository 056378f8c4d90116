"""What a decoder is, in numbers, whatever the family. Imports no torch: a login node can read it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

AttentionKernel = Literal["sdpa", "flex", "varlen"]


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
class MoEConfig:
    """Feed-forward layers that hand each token to a few of many experts; no token is ever dropped."""

    experts: int = 8
    """E: experts a layer."""
    top_k: int = 2
    """k: experts that each token is handed to."""
    hidden_dim: int = 256
    """Width of one expert."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: against those of the other experts, or each for itself."""
    normalize_weights: bool = True
    """Whether the scores of a token's k experts are divided by their sum before they weight the outputs."""
    route_scale: float = 1.0
    """Factor on these weights."""
    groups: int = 1
    """Groups of neighbouring experts; a token may choose from the best `top_groups` of them (arXiv 2412.19437)."""
    top_groups: int = 1
    """Groups a token may choose from; a group counts as much as its two best experts together."""
    shared_hidden_dim: int = 0
    """Width of a feed-forward layer that every token passes beside its experts; 0: none."""
    first_dense_layers: int = 0
    """Layers at the beginning of the model that have a plain feed-forward layer instead."""
    balance_loss: float = 0.0
    """Coefficient of the loss, 1 when all experts of a row get equal work, that grows with imbalance; 0: none."""
    z_loss: float = 0.0
    """Coefficient of the mean squared log-sum-exp of the router's logits, which keeps them small; 0: none."""
    bias_update_rate: float = 0.0
    """Step by which an expert's bias in the choice, not in the weights, falls after a step in which it had more
    than the mean load, and rises after one with less (arXiv 2408.15664); 0: no bias."""
    grouped_mm: Literal["auto", "grouped", "loop"] = field(default="auto", metadata={"part": "how"})
    """Products of all experts in one kernel, expert by expert, or in one kernel where there is one (bfloat16)."""

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence with a remedy; empty if there is none."""
        at_least = dict.fromkeys(("experts", "top_k", "hidden_dim", "groups", "top_groups"), 1)
        at_least |= dict.fromkeys(("shared_hidden_dim", "first_dense_layers"), 0)
        at_least |= dict.fromkeys(("balance_loss", "z_loss", "bias_update_rate"), 0)
        found = [
            f"model.moe.{name} is {getattr(self, name)}; it must be at least {least}."
            for name, least in at_least.items()
            if not getattr(self, name) >= least
        ]
        if not self.route_scale > 0:
            found.append(f"model.moe.route_scale is {self.route_scale}; it must be more than 0.")
        for name, choices in (("score", ("softmax", "sigmoid")), ("grouped_mm", ("auto", "grouped", "loop"))):
            if getattr(self, name) not in choices:
                found.append(f"model.moe.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        return found or self._group_problems()

    def _group_problems(self) -> list[str]:
        if self.groups == 1 == self.top_groups:
            if self.top_k > self.experts:
                return [f"model.moe.top_k {self.top_k} is more than model.moe.experts {self.experts}; lower it."]
            return []
        if self.top_groups >= self.groups:
            return [
                f"model.moe.top_groups {self.top_groups} of model.moe.groups {self.groups} excludes no group; lower "
                "it, or set both to 1."
            ]
        if self.experts % self.groups or self.experts < 2 * self.groups:
            return [
                f"model.moe.groups {self.groups} does not cut model.moe.experts {self.experts} into equal groups of "
                "two or more; choose a divisor."
            ]
        if self.top_k > (reachable := self.experts // self.groups * self.top_groups):
            return [
                f"model.moe.top_k is {self.top_k}, but model.moe.top_groups {self.top_groups} leaves a token only "
                f"{reachable} experts to choose from; raise top_groups or lower top_k."
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
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
    """Width of the feed-forward layer (not of experts)."""
    moe: MoEConfig | None = None
    """Experts instead of plain feed-forward layers; None: none."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, each head for itself, before their positions turn them."""
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
    attention_kernel: AttentionKernel = field(default="sdpa", metadata={"part": "how"})
    """What confines attention to documents, to the same result: sdpa: a mask, anywhere. flex: a block mask, and
    varlen: flash attention in half precision, both faster on a GPU if rows hold several documents."""
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
        if self.moe is not None:
            problems += self.moe.problems()
            if self.moe.first_dense_layers >= max(self.layers, 1):
                problems.append(
                    f"model.moe.first_dense_layers {self.moe.first_dense_layers} leaves none of the {self.layers} "
                    "layers with experts; lower it, or set model.moe to None."
                )
        if self.attention_kernel not in get_args(AttentionKernel):
            problems.append(
                f"model.attention_kernel is {self.attention_kernel!r}; choose one of "
                f"{', '.join(get_args(AttentionKernel))}."
            )
        if self.head_dim % 2:
            problems.append(f"model.head_dim {self.head_dim} is odd; rotary embeddings turn pairs of dimensions.")
        return problems

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of `layer` is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers
