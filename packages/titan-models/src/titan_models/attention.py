"""Grouped-query self-attention, causal and confined to documents."""

from torch import Tensor, nn

from titan_models.attend import attend, masked_attention
from titan_models.kv_cache import LayerCache
from titan_models.rope import apply_rope
from titan_models.shape import AttentionKernel, DecoderShape


class Attention(nn.Module):
    """Projects to queries, keys and values, turns queries and keys by their positions, attends, projects back.

    With `config.qk_norm` each head of queries and keys is normalised first (arXiv 2302.05442, sec. 2; here by RMSNorm).

    The numbers of heads are read from the activations, not from the configuration: a module that holds a part
    of the heads works as it is.
    """

    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(self, config: DecoderShape) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.sdpa = DotProductAttention(config.attention_kernel)
        self.wo = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        document_ids: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`x` [B, S, D] -> [B, S, D]; `rope` is the table of `rope_table` for `positions` [B, S].

        `cache`: sees the tokens that it keeps too, and keeps these.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        mixed = (
            self.sdpa(q, k, v, positions, document_ids)
            if cache is None
            else self.sdpa(q, k, v, positions, document_ids, cache)
        )
        return self.wo(mixed.flatten(-2))


class DotProductAttention(nn.Module):
    """Softmax attention over earlier tokens of the same document; the part that other kernels may replace."""

    def __init__(self, kernel: AttentionKernel = "sdpa") -> None:
        super().__init__()
        if kernel == "varlen":
            import torch.nn.attention.varlen  # noqa: F401 - registers the operator, by whose name its result is kept
        self.kernel: AttentionKernel = kernel

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        document_ids: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Mixes `v` [B, S, K, H] by the similarity of `q` [B, S, N, H] and `k` [B, S, K, H]; N is a multiple of K.

        `document_ids` [B, S] int64: a token sees earlier tokens with its own id; None: each row is one document.
        `positions` [B, S] are for a `cache`, and for kernels that need them; these rely on the order of the row. With
        a cache tokens see those that it keeps, and a row is one document.
        Returns [B, S, N, H].
        """
        if cache is not None:
            return masked_attention(q, *cache.extend(k, v, positions))
        return attend(q, k, v, document_ids, self.kernel)
