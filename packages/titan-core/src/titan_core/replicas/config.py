"""Replica groups: runs that train together although each is started, and may die, by itself. Imports no torch.

A field whose metadata says `{"part": "how"}` may change without changing the loss curve; the others are part of
the experiment.
"""

from dataclasses import dataclass, field
from typing import Literal

from titan_core.config import HOW

INSTALL = "pip install 'torchft>=0.2,<0.3'"  # what the extra `torchft` asks for


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Groups that train on their own and are brought together now and then, instead of in every step."""

    method: Literal["none", "local_sgd", "diloco"] = "none"
    """none: gradients are summed over the groups in every step, and the loss curve is that of a single run. local_sgd:
    weights are averaged. diloco: an outer optimizer, Nesterov's, follows the average of how far the groups went. With
    the last two, each group trains on its own share of every global batch."""
    groups: int | None = None
    """Shares of a global batch, one for each group; None: replica.groups of the first run."""
    every: int = 100
    """Steps between two averages of the same weights."""
    outer_lr: float = 0.7
    """Learning rate of diloco's outer optimizer."""
    outer_momentum: float = 0.9
    """Decay rate of diloco's outer momentum; 0: none."""
    nesterov: bool = True
    """Whether the outer momentum looks ahead by the latest average."""
    fragments: int = 1
    """Parts of the model, of which diloco averages another one each `every` / `fragments` steps."""

    @property
    def interval(self) -> int:
        """Steps between two averages, each of one fragment."""
        return self.every // self.fragments

    def problems(self) -> list[str]:
        """What is out of range or has no effect, each as one sentence; empty if nothing is."""
        where = "replica.averaging"
        if self.method == "none":
            if self != AveragingConfig(groups=self.groups):
                return [f"{where} is set and has no effect without --{where}.method; choose local_sgd or diloco."]
            return []
        found = []
        if self.every < 1:
            found.append(f"{where}.every is {self.every}; it must be at least 1.")
        if self.fragments < 1 or (self.every >= 1 and self.every % self.fragments):
            found.append(f"{where}.fragments {self.fragments} does not divide {where}.every {self.every}; it must.")
        if not 0 < self.outer_lr <= 100:
            found.append(f"{where}.outer_lr is {self.outer_lr}; it must lie above 0, up to 100.")
        if not 0 <= self.outer_momentum < 1:
            found.append(f"{where}.outer_momentum is {self.outer_momentum}; it must lie between 0 and 1, without 1.")
        diloco = AveragingConfig(method=self.method, groups=self.groups, every=self.every)
        if self.method == "local_sgd" and self != diloco:
            found.append(
                f"{where}.outer_lr, outer_momentum, nesterov and fragments are diloco's; leave them out, or use "
                f"--{where}.method diloco."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """Replica groups, which find each other through a Lighthouse of torchft and go on when one of them dies."""

    groups: int = field(default=1, metadata=HOW)
    """Groups at full strength; 1: none, this run is alone. Each is started by itself, all with the same layout."""
    group: int = field(default=0, metadata=HOW)
    """Which of them this one is, from 0."""
    min_groups: int = field(default=1, metadata=HOW)
    """Groups without which no step is taken."""
    lighthouse: str | None = field(default=None, metadata=HOW)
    """Address of the Lighthouse, such as http://host:29510; None: what the variable TORCHFT_LIGHTHOUSE says."""
    host: str | None = field(default=None, metadata=HOW)
    """Name by which other groups reach this machine; None: its host name."""
    join_seconds: float = field(default=60.0, metadata=HOW)
    """Seconds that groups which start wait for all the others, unless these are training already; then `min_groups`
    are enough."""
    quorum_seconds: float = field(default=3600.0, metadata=HOW)
    """Seconds that a group waits for the others to begin a step, or with averaging to come to the next average; after
    that it fails."""
    timeout_seconds: float = field(default=60.0, metadata=HOW)
    """Seconds that a message between groups may take, and a rank's whole state when a group comes back. A group that
    takes longer is left behind."""
    heartbeat_seconds: float = field(default=0.1, metadata=HOW)
    """Seconds between two signs of life to the Lighthouse, whose --heartbeat_timeout_ms should be many times that."""
    bucket_bytes: int = field(default=32 * 2**20, metadata=HOW)
    """Bytes of gradients or weights that are sent to the other groups at one time."""
    averaging: AveragingConfig = AveragingConfig()
    """Groups that are brought together now and then only."""

    @property
    def enabled(self) -> bool:
        """Whether there are several groups, or may be."""
        return self.groups > 1

    def problems(self) -> list[str]:
        """What is out of range, has no effect or does not combine, each as one sentence; empty if nothing is."""
        if not 1 <= self.groups <= 10_000:
            return [f"replica.groups is {self.groups}; it must lie between 1 and 10,000."]
        found = self.averaging.problems()
        if not self.enabled:
            if self != ReplicaConfig(averaging=self.averaging):
                found.append("replica is set and has no effect with one group; give --replica.groups, or leave it out.")
            if self.averaging.method != "none":
                found.append("replica.averaging needs several groups; give --replica.groups 2 or more.")
            return found
        if not 0 <= self.group < self.groups:
            found.append(f"replica.group is {self.group}; with {self.groups} groups it is 0 to {self.groups - 1}.")
        if not 1 <= self.min_groups <= self.groups:
            found.append(f"replica.min_groups is {self.min_groups}; it must lie between 1 and {self.groups}.")
        for name in ("join_seconds", "quorum_seconds", "timeout_seconds", "heartbeat_seconds"):
            least = 0 if name == "join_seconds" else 0.001
            if not least <= getattr(self, name) <= 1e6:
                found.append(f"replica.{name} is {getattr(self, name)}; it must lie between {least} and 1,000,000.")
        if self.bucket_bytes < 1:
            found.append(f"replica.bucket_bytes is {self.bucket_bytes}; it must be at least 1.")
        if self.averaging.method != "none" and self.averaging.groups not in (None, self.groups):
            found.append(
                f"replica.averaging.groups is {self.averaging.groups} and replica.groups {self.groups}. With averaging "
                "the loss curve depends on their number; start as many groups as the run began with."
            )
        return found
