"""How a run is laid out, and how its optimizer and schedule behave. Imports no torch: a login node can read it.

A field whose metadata says `{"part": "how"}` may change without changing the loss curve; the others are part of
the experiment.
"""

from dataclasses import dataclass, field
from typing import Literal

HOW = {"part": "how"}


Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
StateDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the work, and along which lines. None of it changes the loss curve."""

    dp_replicate: int = 1
    """Data-parallel replicas, each with its own copy of the (possibly sharded) parameters."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer states are sharded (FSDP2); -1: what is left."""
    tp: int = 1
    """Tensor-parallel ranks: every weight matrix is cut over them."""
    cp: int = 1
    """Context-parallel ranks: every sequence is cut over them."""
    pp: int = 1
    """Pipeline-parallel ranks: the layers are cut over them."""
    ep: int = 1
    """Expert-parallel ranks, taken from dp_shard x cp x tp: the experts are cut over them."""
    grad_sync: Literal["auto", "last", "every"] = "auto"
    """When gradients are reduced while accumulating: after `every` micro-batch, or after the `last` only, which
    communicates less but keeps whole gradients in memory. `auto` reduces over shards every time and over
    replicas last. A pipeline always reduces last."""
    reshard_after_forward: Literal["default", "always", "never"] | int = "default"
    """Whether FSDP frees gathered parameters between forward and backward; a number: shards them over only so many
    ranks until backward. `default` frees them except in a pipeline, and except what the backward needs first."""
    cpu_offload: bool = False
    """Whether parameters, gradients and optimizer states live in the host's memory, for GPUs with too little."""
    sequence_parallel: bool = True
    """Whether tp also cuts the hidden states between regions along the sequence."""
    async_tp: bool = False
    """Whether tp overlaps its communication with matrix products (needs --compile.enabled and GPUs with symmetric
    memory)."""
    cp_method: Literal["ring", "allgather", "ulysses"] = "ring"
    """How context-parallel attention sees other ranks' tokens: keys and values passed around a ring, gathered, or heads
    exchanged for tokens."""
    cp_load_balance: bool = True
    """Whether each cp rank takes a part of a sequence's beginning and one of its end, so that causal attention costs
    all ranks the same."""
    pp_schedule: Schedule = "1F1B"
    """Order of the pipeline's micro-batches."""
    pp_schedule_csv: str | None = None
    """CSV file with one line a rank of actions such as 0F0, 0B0, 0I0, 0W0 (stage, action, micro-batch), used instead of
    pp_schedule."""
    pp_stages_per_rank: int | None = None
    """Stages on each pipeline rank; None: as many as pp_schedule needs."""
    pp_split: tuple[str, ...] = ()
    """FQNs of the blocks with which the second and all later stages begin; empty: balanced by cost."""
    deterministic: bool = False
    """Use only kernels that give the same bits for the same input; slower on GPUs."""


@dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Activation recomputation (activation checkpointing)."""

    mode: Literal["none", "full", "selective", "budget"] = "none"
    """`full` keeps only a block's input; `selective` keeps the results of save_ops too; `budget` lets the compiler
    choose (needs --compile.enabled)."""
    every: int = 1
    """Recompute every n-th block only."""
    save_ops: tuple[str, ...] = ()
    """Operators whose results `selective` keeps, such as aten.mm.default; empty: matrix products, attention, and
    communication that sums or exchanges. Whole sequences, which tp and cp gather, are gathered again instead."""
    budget: float = 0.5
    """Share of a block's activations that `budget` keeps, 0 to 1."""

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence; empty if there is none."""
        problems = []
        if self.every < 1:
            problems.append(f"remat.every is {self.every}; it must be at least 1.")
        if not 0 <= self.budget <= 1:
            problems.append(f"remat.budget is {self.budget}; it must lie between 0 and 1.")
        if self.save_ops and self.mode != "selective":
            problems.append(f"remat.save_ops has no effect with --remat.mode {self.mode}; use --remat.mode selective.")
        if self.mode == "none" and self.every > 1:
            problems.append("remat.every has no effect with --remat.mode none; use full or selective.")
        return problems


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """torch.compile of each block."""

    enabled: bool = False
    """Whether blocks are compiled."""
    backend: str = "inductor"
    """Compiler backend; aot_eager traces without generating code."""
    fullgraph: bool = False
    """Whether a block that does not compile as a whole is an error."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon: momentum whose matrices are made orthogonal before they are added."""

    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the momentum looks ahead by the latest gradient."""
    ns_steps: int = 5
    """Iterations of Newton-Schulz, which bring the singular values of an update near 1."""
    ns_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of these iterations, and of what ranks send each other for them."""
    scale: Literal["rms", "spectral"] = "rms"
    """Size of an update of rows x columns: `rms` 0.2 * sqrt(max(rows, columns)), so that learning rates and weight
    decays of AdamW fit; `spectral` sqrt(max(1, rows / columns)), as Muon was first published."""

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence; empty if there is none."""
        problems = []
        if not 0 <= self.momentum < 1:
            problems.append(f"optimizer.muon.momentum is {self.momentum}; it must lie between 0 and 1, without 1.")
        if not 1 <= self.ns_steps <= 100:
            problems.append(f"optimizer.muon.ns_steps is {self.ns_steps}; it must lie between 1 and 100 (5 is usual).")
        return problems


@dataclass(frozen=True, kw_only=True)
class ParamGroupConfig:
    """Some parameters, named by role or by FQN, and what the optimizer does differently with them."""

    roles: tuple[str, ...] = ()
    """Roles of the modules that own them; `bias` stands for every bias."""
    patterns: tuple[str, ...] = ()
    """Their FQNs, in which `*` stands for one part between dots, such as layers.*.attention.wq.weight."""
    lr_factor: float = 1.0
    """Their learning rate as a multiple of the others'."""
    weight_decay: float | None = None
    """Their weight decay; None: the usual one of their roles."""
    optimizer: Literal["adamw", "muon"] | None = None
    """What moves them; None: what optimizer.name says of their roles."""

    def problems(self, where: str) -> list[str]:
        """Every value out of range, each as one sentence that begins with `where`; empty if there is none."""
        problems = []
        if not self.roles and not self.patterns:
            problems.append(f"{where} names no parameters; give it roles or patterns.")
        if not 0 <= self.lr_factor <= 1e6:
            problems.append(f"{where}.lr_factor is {self.lr_factor}; it must lie between 0 and 1,000,000.")
        if self.weight_decay is not None and not 0 <= self.weight_decay <= 1e3:
            problems.append(f"{where}.weight_decay is {self.weight_decay}; it must lie between 0 and 1,000.")
        return problems


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, parameter groups, and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices inside of blocks; everything else (embedding, head, norms, biases) is AdamW's."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate at each step."""
    no_decay: tuple[str, ...] = ("norm", "head_norm", "embedding", "bias")
    """Roles without weight decay; `bias` stands for every bias. A head that shares the embedding's weight counts
    as embedding."""
    max_grad_norm: float = 1.0
    """Gradients whose global norm is larger are scaled down to it; 0 switches clipping off."""
    state_dtype: StateDtype = "float32"
    """How AdamW keeps its moments between steps. int8 and int4: codes of as many bits, with a scale for each block of a
    row; vectors and what has fewer than 4,096 elements stay in float32. Muon's momentum may be bfloat16 too."""
    state_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How AdamW's moments are rounded to bfloat16. With a beta2 above 0.99, `nearest` loses steps of the second moment,
    which are smaller than half of its last digit."""
    parameter_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights that are kept in bfloat16 are rounded after a step. `nearest` loses steps smaller than half of their
    last digit; `stochastic` keeps them on average."""
    state_offload: bool = field(default=False, metadata=HOW)
    """Whether AdamW's moments rest in the host's memory, and visit the GPU during a step."""
    muon: MuonConfig = MuonConfig()
    groups: tuple[ParamGroupConfig, ...] = ()
    """Parameters that are treated differently; the first group that fits a parameter counts."""

    def uses_muon(self) -> bool:
        """Whether Muon moves any parameter."""
        return self.name == "muon" or any(group.optimizer == "muon" for group in self.groups)

    def problems(self) -> list[str]:
        """What is out of range, has no effect or does not combine, each as one sentence; empty if nothing is."""
        problems = self.muon.problems()
        for i, group in enumerate(self.groups):
            problems += group.problems(f"optimizer.groups[{i}]")
        if self.muon != MuonConfig() and not self.uses_muon():
            problems.append("optimizer.muon has no effect with --optimizer.name adamw; use --optimizer.name muon.")
        if self.state_rounding == "stochastic" and self.state_dtype != "bfloat16":
            problems.append(
                f"optimizer.state_rounding stochastic has no effect with --optimizer.state-dtype {self.state_dtype}; "
                "use bfloat16, or leave it at nearest."
            )
        return problems + self._muon_problems() * self.uses_muon()

    def _muon_problems(self) -> list[str]:
        problems = []
        if self.state_dtype in ("int8", "int4"):
            problems.append(
                f"optimizer.state_dtype {self.state_dtype} is for AdamW's moments, and Muon moves some parameters; use "
                "bfloat16, or --optimizer.name adamw."
            )
        if self.parameter_rounding == "stochastic":
            problems.append("optimizer.parameter_rounding stochastic is AdamW's; use --optimizer.name adamw.")
        if self.state_offload:
            problems.append("optimizer.state_offload is AdamW's; use --optimizer.name adamw.")
        return problems

    def offload_problems(self, device: str, parallel: ParallelConfig) -> list[str]:
        """Why `state_offload` has no effect on a `device` such as cuda, in one sentence; empty if it has, or is off."""
        if self.state_offload and device == "cpu":
            return ["optimizer.state_offload has no effect on a CPU, where all is in the host's memory; leave it out."]
        if self.state_offload and parallel.cpu_offload:
            return ["optimizer.state_offload has no effect beside parallel.cpu_offload, which moves more; drop it."]
        return []


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable, decay: the learning rate's factor over the steps."""

    total_steps: int | None = None
    """Steps at which the decay ends; None: `training.steps` of the first run."""
    warmup_steps: int = 20
    """Steps of linear rise from 1/warmup_steps of the peak."""
    decay_ratio: float = 0.2
    """Share of total_steps spent decaying at the end."""
    decay: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_factor: float = 0.0
    """Factor at the end of the decay."""

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence; empty if there is none."""
        problems = []
        if self.warmup_steps < 0:
            problems.append(f"schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        if not 0 <= self.decay_ratio <= 1:
            problems.append(f"schedule.decay_ratio is {self.decay_ratio}; it must lie between 0 and 1.")
        if not 0 <= self.min_factor <= 1:
            problems.append(f"schedule.min_factor is {self.min_factor}; it must lie between 0 and 1.")
        if self.total_steps is not None and self.total_steps < 1:
            problems.append(f"schedule.total_steps is {self.total_steps}; it must be at least 1.")
        return problems


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to a step whose loss or gradient is not finite, or whose loss is a spike."""

    policy: Literal["raise", "skip", "rewind"] = "raise"
    """Such a step never moves a parameter. raise: the run ends. skip: its step and its batch are used up without an
    update. rewind: the run goes back to the newest checkpoint, and on from there with the batch after the bad one."""
    sigma: float = 0.0
    """A loss is a spike if it lies so many standard deviations above the mean of the last losses; 0: none is, and only
    what is not finite counts."""
    window: int = 128
    """Steps that the mean and the deviation are of; nothing is a spike before there were so many good ones."""
    max_skips: int = 10
    """Steps in a row that may be skipped; the run ends with the next one."""
    max_rewinds: int = 3
    """Times that a run may go back; it ends the next time."""

    def problems(self) -> list[str]:
        """What is out of range or has no effect, each as one sentence; empty if nothing is."""
        found = []
        if not 0 <= self.sigma <= 1_000:
            found.append(f"guard.sigma is {self.sigma}; it must lie between 0 and 1,000.")
        if self.window < 2:
            found.append(f"guard.window is {self.window}; it must be at least 2: one loss has no deviation.")
        if self.window != GuardConfig.window and not self.sigma:
            found.append(
                "guard.window has no effect without --guard.sigma, which says how far from its mean is a spike."
            )
        for name, policy in (("max_skips", "skip"), ("max_rewinds", "rewind")):
            value, default = getattr(self, name), getattr(GuardConfig, name)
            if value < 1:
                found.append(f"guard.{name} is {value}; it must be at least 1 (--guard.policy raise ends at once).")
            if value != default and self.policy != policy:
                found.append(f"guard.{name} has no effect with --guard.policy {self.policy}; it is for {policy}.")
        return found
