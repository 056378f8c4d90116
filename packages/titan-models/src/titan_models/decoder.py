"""The decoder-only transformer that every family shares, written for one device.

A pipeline stage is this class with parts missing: where `tok_embeddings` is absent the input is hidden states,
where `norm` or `lm_head` is absent it is skipped. No shape is read from the configuration after construction, so that
activations may be one rank's share.
"""

import torch
from torch import Tensor, nn

from titan_models.attention import Attention
from titan_models.feed_forward import FeedForward
from titan_models.head import Head
from titan_models.kv_cache import KVCache, LayerCache
from titan_models.moe import MoE
from titan_models.rope import rope_frequencies, rope_table
from titan_models.shape import DecoderShape


class Decoder(nn.Module):
    """Token embedding, a stack of blocks, a norm and a head."""

    tok_embeddings: nn.Embedding | None
    norm: nn.RMSNorm | None
    lm_head: Head | None

    def __init__(self, config: DecoderShape) -> None:
        super().__init__()
        self.rope_frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        # A dict keeps the names of the blocks when a pipeline stage drops some of them.
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.layers)})
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Head(config.dim, config.vocab_size, config.loss_chunk_tokens)
        if config.tie_embeddings:
            self.tok_embeddings.weight = self.lm_head.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        row_weights: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        take: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V], or with `labels` [B, S] int64 the summed loss (see `Head`).

        `x`: tokens [B, S] int64 (hidden states [B, S, D] on a stage without embedding). `positions` [B, S] int64
        count from 0 in each document; `document_ids` [B, S] int64 confine attention, None makes each row one document.
        `row_weights` [B] float are the shares of the rows in the mean loss, their valid tokens divided by those of the
        global batch, 0 for padding: routers need them, since their auxiliary losses are not part of the summed loss
        (see `titan_models.router`). None means 1 / B each, which is right if this is the whole batch.
        `cache`: tokens see those that it keeps, and are kept. `take` [B] int64: the one place of each row whose logits
        [B, 1, V] are wanted.
        """
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        rope = rope_table(positions, self.rope_frequencies, x.dtype)
        for name, block in self.layers.items():
            if cache is None:
                x = block(x, rope, positions, document_ids, row_weights)
            else:
                x = block(x, rope, positions, document_ids, row_weights, cache.layer(name))
        if take is not None:
            x = x[torch.arange(x.shape[0], device=x.device), take][:, None]
        if self.norm is not None:
            x = self.norm(x)
        return x if self.lm_head is None else self.lm_head(x, labels)


class Block(nn.Module):
    """One layer: attention and a feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderShape, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        if config.moe is not None and config.has_experts(layer):
            self.moe = MoE(config.dim, config.moe)
        else:
            self.moe = None
            self.feed_forward = FeedForward(config.dim, config.hidden_dim)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        document_ids: Tensor | None,
        row_weights: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`x` [B, S, D] -> [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), rope, positions, document_ids, cache)
        hidden = self.ffn_norm(x)
        return x + (self.feed_forward(hidden) if self.moe is None else self.moe(hidden, row_weights))
