"""A model cut down to what fits into memory and still uses every kind of weight: embedding, first and last block, head.

Of the vocabulary a few runs of rows are kept, of experts as many as fit. All cuts are views on lazy tensors: what is
cut off is never read.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from titan_ckpt.formats.collection import Tensors
from titan_ckpt.formats.lazy import LazyTensor, concatenate, narrow
from titan_models.config import DecoderConfig

_RUNS = 8
_RUN_ROWS = 64
_EXPERT_BYTES = 1 << 30  # a block's experts in float32


@dataclass(frozen=True)
class Cut:
    """Which part of a model is kept."""

    config: DecoderConfig
    """Of the whole model."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that are kept."""
        return tuple(sorted({0, self.config.layers - 1}))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """First and last row of each part of the vocabulary that is kept."""
        vocab = self.config.vocab_size
        if vocab <= _RUNS * _RUN_ROWS:
            return [(0, vocab)]
        starts = [round(i * (vocab - _RUN_ROWS) / (_RUNS - 1)) for i in range(_RUNS)]
        return [(start, start + _RUN_ROWS) for start in starts]

    @property
    def experts(self) -> int:
        """Experts of a block that are kept: the first ones."""
        moe = self.config.moe
        if moe is None:
            return 0
        fit = _EXPERT_BYTES // (3 * 4 * moe.hidden_dim * self.config.dim)
        return min(moe.experts, max(fit, moe.top_k, 2))

    @property
    def small(self) -> DecoderConfig:
        """The configuration of what is kept."""
        changes: dict[str, object] = {
            "layers": len(self.layers),
            "vocab_size": sum(stop - start for start, stop in self.runs),
        }
        if (moe := self.config.moe) is not None:
            dense = sum(not self.config.has_experts(layer) for layer in self.layers)
            changes["moe"] = dataclasses.replace(moe, experts=self.experts, first_dense_layers=dense)
        return dataclasses.replace(self.config, **changes)  # pyrefly: ignore[bad-argument-type]

    def tensors(
        self, whole: Tensors, vocabulary: Mapping[str, int], stacked: str, router: str
    ) -> dict[str, LazyTensor]:
        """What is kept of a model's tensors, under the names that they have in the small one.

        Args:
            whole: by the names of some format, in which blocks are `layers.N`.
            vocabulary: the names of those with a row for each token -> 0.
            stacked: pattern of the names whose first dimension is the experts.
            router: pattern of the names whose rows are the experts.
        """
        kept = {}
        for name, tensor in whole.items():
            if (layer := re.search(r"\blayers\.(\d+)\.", name)) is not None:
                if int(layer[1]) not in self.layers:
                    continue
                number = self.layers.index(int(layer[1]))
                short = name[: layer.start(1)] + str(number) + name[layer.end(1) :]
            else:
                short = name
            if (expert := re.search(r"\bexperts\.(\d+)\.", name)) is not None and int(expert[1]) >= self.experts:
                continue
            if name in vocabulary:
                tensor = concatenate([narrow(tensor, 0, start, stop - start) for start, stop in self.runs], 0)
            elif re.search(stacked, name) or re.search(router, name):
                tensor = narrow(tensor, 0, 0, self.experts)
            kept[short] = tensor
        return kept
