"""What a run computes, how it is laid out and where it writes. Imports no torch.

The configuration has three parts. A field belongs to the part of its section unless its own metadata says otherwise
(`{"part": "how"}`). Only the *what* is fingerprinted: change the *how* or the *where* and it is still the same run.
"""

import shlex
from dataclasses import dataclass, field
from typing import Literal

from titan_ckpt.config import CheckpointConfig
from titan_core.config import CompileConfig, GuardConfig, OptimizerConfig, ParallelConfig, RematConfig, ScheduleConfig
from titan_core.replicas.config import ReplicaConfig
from titan_data.config import DataConfig
from titan_data.loader_config import LoaderConfig
from titan_data.mixture_config import MixtureConfig
from titan_data.sft_config import SFTConfig
from titan_data.stream_config import StreamConfig
from titan_data.validation_config import ValidationConfig
from titan_metrics.config import DebugConfig, MetricsConfig, ProfilingConfig, SpansConfig, WatchdogConfig
from titan_models.config import DecoderConfig
from titan_quant.config import LoRAConfig, MixedPrecision, QuantConfig

HOW = {"part": "how"}
WHERE = {"part": "where"}


@dataclass(frozen=True, kw_only=True)
class DataSection(DataConfig):
    """A corpus, what is made of it, and how it is read ahead."""

    kind: Literal["text", "mixture", "sft", "stream"] = "text"
    """text: windows of data.source, which is tokenized once and kept. mixture: of several corpora, as data.mixture
    says. sft: conversations, with loss on what the assistant says, as data.sft says. stream: data.source, tokenized
    while it trains and not kept, as data.stream says."""
    mixture: MixtureConfig = MixtureConfig()
    """For kind mixture."""
    sft: SFTConfig = SFTConfig()
    """For kind sft."""
    stream: StreamConfig = StreamConfig()
    """For kind stream."""
    loader: LoaderConfig = field(default=LoaderConfig(), metadata=HOW)
    """How batches are read ahead."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The batch, the seed and the length of a run."""

    seq_len: int = 256
    """S: tokens in a sequence."""
    global_batch_size: int = 16
    """Sequences in a step, over all ranks."""
    seed: int = 0
    """Every random number follows from it: initial weights and the order of the data."""
    micro_batch_size: int | None = field(default=None, metadata=HOW)
    """Sequences a rank computes at one time; None: all of its share, or in a pipeline as many as give each stage one
    to work on. Gradients are accumulated over the rest."""
    steps: int = field(default=100, metadata=WHERE)
    """Step to stop at; may be raised later (the decay ends at schedule.total_steps)."""
    log_samples: bool = field(default=False, metadata=WHERE)
    """Whether each data-parallel rank writes the ids of the samples it reads to samples/rank-N.jsonl in the run
    directory."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(CheckpointConfig):
    """Checkpoints, and what may differ when a run continues from one."""

    directory: str | None = None
    """Where checkpoints are: a folder, or a URL that fsspec knows such as s3://bucket/run; None: checkpoints in the run
    directory."""
    allow_changes: bool = False
    """Continue although what is computed differs from the checkpoint's configuration."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The weights for others to use, beside checkpoints."""

    format: Literal["none", "huggingface", "peft"] = "none"
    """huggingface: safetensors with config.json and tokenizer, in hugging_face/step-N of the run directory; LoRA
    adapters are added to the weights. peft: the adapters alone, in peft/step-N, as Hugging Face's PEFT loads them."""
    every: int = 0
    """Steps between exports, which training waits for; 0: only after the last step."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights; None: precision.master_dtype."""
    shard_bytes: int = 5_000_000_000
    """Bytes of weights in a file; ranks write files side by side."""

    def due(self, step: int, *, is_last: bool) -> bool:
        """Whether to export after `step`."""
        return self.format != "none" and (is_last or (self.every > 0 and step % self.every == 0))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Judging what is exported, while training goes on."""

    command: str | None = None
    """Command that is run beside rank 0 for each export, one after another; {export} in it stands for the folder and
    {step} for the step. The last line it prints is JSON of numbers, such as {"accuracy": 0.25}, which are logged."""
    timeout_seconds: float = 3600.0
    """After which a command is ended."""

    def problems(self) -> list[str]:
        """What is out of range or cannot be run, each as one sentence; empty if nothing is."""
        found = []
        if not 0 < self.timeout_seconds <= 1e7:
            found.append(f"evaluation.timeout_seconds is {self.timeout_seconds}; it must lie between 0 and 10,000,000.")
        if self.command is None:
            if self.timeout_seconds != EvaluationConfig.timeout_seconds:
                found.append("evaluation.timeout_seconds has no effect without --evaluation.command.")
            return found
        try:
            shlex.split(self.command)
        except ValueError as error:
            found.append(f"evaluation.command {self.command!r} cannot be read: {error}.")
        if "{export}" not in self.command:
            found.append(
                f"evaluation.command {self.command!r} does not say what it judges; put {{export}} where the folder is."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    # -- What is computed. A change here is another experiment.

    model: DecoderConfig
    """The model's shape."""
    data: DataSection = DataSection()
    """Text, tokenizer and order."""
    training: TrainingConfig = TrainingConfig()
    """Batch, seed and length."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the steps."""
    guard: GuardConfig = GuardConfig()
    """What happens to steps that diverge."""
    precision: MixedPrecision = MixedPrecision()
    """Dtypes of weights, computation and reduction."""
    quant: QuantConfig = QuantConfig()
    """Low-precision recipe."""
    lora: LoRAConfig = LoRAConfig()
    """Low-rank adapters, which are all that is trained then."""

    replica: ReplicaConfig = ReplicaConfig()
    """Groups of ranks that train together and may come and go; of it, only `averaging` changes the loss curve."""

    # -- How it is laid out. A change here leaves the loss curve as it is.

    parallel: ParallelConfig = field(default=ParallelConfig(), metadata=HOW)
    """Parallel degrees, and how each parallelism works."""
    remat: RematConfig = field(default=RematConfig(), metadata=HOW)
    """Activation recomputation."""
    compile: CompileConfig = field(default=CompileConfig(), metadata=HOW)
    """torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=HOW)
    """Device to train on; auto: a GPU if there is one. AMD GPUs are `cuda` to PyTorch."""

    # -- Where it writes, and how often.

    output: str | None = field(default=None, metadata=WHERE)
    """Run directory; a run that was started there before goes on. None: runs/<config>-<time>."""
    checkpoint: CheckpointSection = field(default=CheckpointSection(), metadata=WHERE)
    """Saving and resuming."""
    export: ExportConfig = field(default=ExportConfig(), metadata=WHERE)
    """Weights in a format of others."""
    evaluation: EvaluationConfig = field(default=EvaluationConfig(), metadata=WHERE)
    """What judges them."""
    validation: ValidationConfig = field(default=ValidationConfig(), metadata=WHERE)
    """What the model is tested on while it trains."""
    metrics: MetricsConfig = field(default=MetricsConfig(), metadata=WHERE)
    """What is logged, and where to."""
    spans: SpansConfig = field(default=SpansConfig(), metadata=WHERE)
    """Phases of each step, rank by rank."""
    profiling: ProfilingConfig = field(default=ProfilingConfig(), metadata=WHERE)
    """Profiles and photographs of memory."""
    watchdog: WatchdogConfig = field(default=WatchdogConfig(), metadata=WHERE)
    """What happens when no step ends."""
    debug: DebugConfig = field(default=DebugConfig(), metadata=WHERE)
    """Slow checks."""
    hooks: tuple[str, ...] = field(default=(), metadata=WHERE)
    """Hooks of your own, each MODULE:NAME of a class that is called with the trainer and its log. They are no part of
    the experiment: what they do to it is yours to answer for."""
