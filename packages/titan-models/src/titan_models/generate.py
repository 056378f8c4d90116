"""Text from a model, a token at a time for each of several prompts.

A row's random numbers are functions of the seed and its number in the batch: what is drawn for it does not depend on
how long the other rows are. Every rank of a tensor-parallel model draws the same, since all have the same logits.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_models.kv_cache import KVCache


class SamplingError(ValueError):
    """Settings that mean nothing; the message lists them."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen by its logits."""

    temperature: float = 0.0
    """What logits are divided by; 0: the most probable token, always."""
    top_k: int = 0
    """Choose among so many most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest most probable tokens that have this probability together (arXiv 1904.09751)."""
    seed: int = 0
    """Fixes what is drawn."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence; empty if there is none."""
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature is {self.temperature}; it must be 0 or more.")
        if self.top_k < 0:
            found.append(f"top_k is {self.top_k}; it must be 0 or more.")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            found.append("top_k and top_p choose among several tokens, and temperature 0 takes the best; raise it.")
        return found


def check_request(prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling) -> None:
    """Raises `SamplingError` if `sampling` has problems, a prompt is empty or there is none, or nothing is wanted."""
    problems = sampling.problems()
    if not prompts or not all(prompts):
        problems.append("every prompt needs a token to go on from, and one of them has none.")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if problems:
        raise SamplingError(" ".join(problems))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = Sampling(),
    device: torch.device | str = "cpu",
) -> Iterator[list[int | None]]:
    """Yields the next token of each row, again and again, until all rows have stopped.

    Args:
        model: a `titan_models.decoder.Decoder`.
        prompts: tokens of each row, at least one.
        max_new_tokens: after which a row stops.
        stop: tokens after which a row stops; they are yielded. A row that has stopped yields None.
        sampling: how tokens are chosen.
        device: where the model is.

    Raises:
        SamplingError: see `check_request`; before anything is yielded.
    """
    check_request(prompts, max_new_tokens, sampling)
    return _generate(model, prompts, max_new_tokens, frozenset(stop), sampling, torch.device(device))


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    sampling: Sampling,
    device: torch.device,
) -> Iterator[list[int | None]]:
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(max(lengths) + max_new_tokens)
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    positions = torch.arange(max(lengths)).expand_as(tokens)
    choosers = [_Chooser(sampling, row) for row in range(len(prompts))]
    running = [True] * len(prompts)
    last = torch.tensor(lengths) - 1
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(tokens.to(device), positions.to(device), cache=cache, take=last.to(device))[:, 0]
        chosen = _choose(logits, choosers)
        yield [token if runs else None for token, runs in zip(chosen, running, strict=True)]
        running = [runs and token not in stop for token, runs in zip(chosen, running, strict=True)]
        if not any(running):
            return
        # Rows that have stopped go on unseen: all rows have one shape.
        positions = positions.gather(1, last[:, None]) + 1
        tokens, last = torch.tensor(chosen)[:, None], torch.zeros_like(last)


def _choose(logits: Tensor, choosers: Sequence["_Chooser"]) -> list[int]:
    if choosers[0].sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    return [chooser.choose(own) for chooser, own in zip(choosers, logits.float().cpu(), strict=True)]


class _Chooser:
    """Draws the tokens of one row."""

    def __init__(self, sampling: Sampling, row: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(hash((sampling.seed, row)) % 2**63)

    def choose(self, logits: Tensor) -> int:
        """A token by `logits` [V] float32."""
        ordered, tokens = logits.sort(descending=True, stable=True)
        if self.sampling.top_k:
            ordered = ordered[: self.sampling.top_k]
        shares = (ordered / self.sampling.temperature).softmax(0)
        # As many as it takes: those before the sum reaches top_p, and the one with which it does.
        before = shares.cumsum(0) - shares
        shares = shares.where(before < self.sampling.top_p, 0.0)
        return int(tokens[torch.multinomial(shares, 1, generator=self._generator)])
