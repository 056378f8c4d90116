"""The memory of a training step by arithmetic, before a cluster is paid for: what `titan-plan` shows. Imports no torch.

titan-models plays its blocks with sizes, titan-core plays a step of their scripts on a layout; here both are told what
a run's configuration means for them. What neither models is refused by name. `titan-train --dry-run` rehearses the real
code and covers more.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from titan_core.config import RematConfig
from titan_core.degrees import Degrees, resolve_degrees
from titan_core.pipelining.rank_order import rank_order
from titan_core.pipelining.stages import SCHEDULES, stage_names, stage_ranks
from titan_core.planning.ledger import Category
from titan_core.planning.sharding_memory import Policy
from titan_core.planning.step_memory import StageUnits, Unit, step_memory
from titan_core.planning.surroundings import ParallelSurroundings
from titan_core.planning.timeline import Computation
from titan_core.planning.weights_memory import (
    LocalWeight,
    Weight,
    adamw_state_bytes,
    adamw_working_bytes,
    groups_of,
    local_weight,
)
from titan_core.roles import matches
from titan_models.activations import DecoderActivations, Extent
from titan_models.facts import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, flops_per_token, parameter_shapes
from titan_train.config import TrainConfig
from titan_train.rows import Rows, share_rows

Bytes = Mapping[Category, int]

_ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}
_INT64 = 8
FRAGMENTATION = 0.05
"""Share of all that lives which an allocator is taken to waste: an assumption, not measured."""


class PlanError(ValueError):
    """What the arithmetic does not model; the message names it and what does."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training step takes of the rank that needs most."""

    world_size: int
    """Number of ranks."""
    degrees: Degrees
    """How they are arranged."""
    rows: Rows
    """What each computes."""
    pipeline_rank: int
    """Whose memory this is: the heaviest pipeline rank."""
    memory: Bytes
    """Bytes by category when most is alive."""
    by_pipeline_rank: tuple[int, ...]
    """Bytes that each pipeline rank needs."""

    @property
    def peak(self) -> int:
        """Bytes alive when most are."""
        return sum(self.memory.values())

    @property
    def fragmentation(self) -> int:
        """Bytes that an allocator is taken to waste."""
        return math.ceil(FRAGMENTATION * self.peak)

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.peak + self.fragmentation


def plan(config: TrainConfig, world_size: int) -> Plan:
    """The memory of a step of a validated configuration on `world_size` ranks.

    Raises:
        PlanError: for what is not modelled.
    """
    check_modelled(config)
    degrees = resolve_degrees(config.parallel, world_size)
    layout = _Layout(config, degrees)
    found = [layout.memory(rank) for rank in range(degrees.pp)]
    totals = [sum(memory.values()) for memory in found]
    heaviest = totals.index(max(totals))
    return Plan(
        world_size=world_size,
        degrees=degrees,
        rows=layout.rows,
        pipeline_rank=heaviest,
        memory=found[heaviest],
        by_pipeline_rank=tuple(totals),
    )


REMAT_MODES: Mapping[str, RematConfig] = {
    "none": RematConfig(),
    "selective": RematConfig(mode="selective"),
    "full, every 2": RematConfig(mode="full", every=2),
    "full": RematConfig(mode="full"),
}


def plans_by_remat(config: TrainConfig, world_size: int) -> dict[str, Plan]:
    """The plan under each mode of recomputation, by its name."""
    return {
        name: plan(dataclasses.replace(config, remat=remat), world_size)
        for name, remat in REMAT_MODES.items()
        if not (remat.mode == "selective" and _splits(config))
    }


def check_modelled(config: TrainConfig) -> None:
    """Raises `PlanError` for what the arithmetic leaves out."""
    parallel, optimizer, remat, lora = config.parallel, config.optimizer, config.remat, config.lora
    left_out = {
        f"quant.recipe {config.quant.recipe}": config.quant.recipe != "none",
        "optimizer muon": optimizer.uses_muon(),
        "optimizer.state_offload": optimizer.state_offload,
        "parallel.cpu_offload": parallel.cpu_offload,
        f"parallel.reshard_after_forward {parallel.reshard_after_forward}": type(parallel.reshard_after_forward) is int,
        f"parallel.cp_method {parallel.cp_method}": parallel.cp > 1 and parallel.cp_method != "ring",
        f"parallel.pp_schedule {parallel.pp_schedule}": _splits(config),
        "remat.mode budget": remat.mode == "budget",
        "remat.save_ops": bool(remat.save_ops),
        "lora.include and lora.exclude": bool(lora.rank and (lora.include or lora.exclude)),
        f"lora.roles {', '.join(lora.roles)}": bool(lora.rank and not {"colwise", "rowwise"}.issuperset(lora.roles)),
    }
    if found := [name for name, given in left_out.items() if given]:
        raise PlanError(
            f"The arithmetic of titan-plan does not model {'; '.join(found)}. Leave that out to plan for the rest, or "
            "rehearse the step with titan-train --dry-run, which takes a minute instead of a second."
        )


def _splits(config: TrainConfig) -> bool:
    parallel = config.parallel
    return parallel.pp > 1 and not parallel.pp_schedule_csv and SCHEDULES[parallel.pp_schedule].splits_backward


class _Layout:
    """A configuration on its ranks."""

    def __init__(self, config: TrainConfig, degrees: Degrees) -> None:
        self._config, self._degrees, self._model = config, degrees, config.model
        self.rows = share_rows(config.training, config.parallel, degrees, groups=config.replica.groups)
        self._master, self._param, self._reduce = (_ITEMSIZE[name] for name in config.precision.resolved())
        self._fsdp = degrees.world_size > 1
        self._weights = self._local_weights()
        self._stages = self._cut()
        self._members: dict[str, list[str]] = {}  # of each outermost module: its parameters
        for fqn in self._weights:
            module = ".".join(fqn.split(".")[: 2 if fqn.startswith("layers.") else 1])
            self._members.setdefault(module, []).append(fqn)
        self._played = DecoderActivations(
            config.model, self._extent(), ParallelSurroundings(config.parallel, degrees, self._param)
        )

    def memory(self, pipeline_rank: int) -> Bytes:
        """Bytes by category that the first rank of a pipeline rank needs when most is alive."""
        modules = self._stages[pipeline_rank]
        own = {fqn for names in modules.values() for name in names for fqn in self._within(name)}
        weights = [weight for fqn, weight in self._weights.items() if fqn in own]
        recomputed = self._recomputed(modules)
        stages = {number: self._stage(names, recomputed) for number, names in modules.items()}
        held = self._held(weights, own)
        during = step_memory(stages, self._policy(), held, self._actions(pipeline_rank))
        update = self._update(weights, held)
        return during if sum(during.values()) >= sum(update.values()) else update

    def _local_weights(self) -> dict[str, LocalWeight]:
        """FQN -> parameter, in the model's order."""
        roles, lora = self._model.roles(), self._config.lora
        adapted = lora.roles if lora.rank else ()
        found: dict[str, LocalWeight] = {}

        def put(fqn: str, weight: Weight) -> None:
            found[fqn] = local_weight(weight, self._degrees)

        for fqn, shape in parameter_shapes(self._model).items():
            module, _, name = fqn.rpartition(".")
            role = next(role for pattern, role in roles.items() if matches(pattern, module))
            put(fqn, Weight(name=name, shape=shape, role=role, trained=not lora.rank))
            if role in adapted:
                cuts: Mapping[str, tuple[int | None, int | None]] = {"colwise": (None, 0), "rowwise": (1, None)}
                down, up = (lora.rank, shape[1]), (shape[0], lora.rank)
                for name, size, dim in zip(("lora_a", "lora_b"), (down, up), cuts[role], strict=True):
                    put(f"{module}.{name}", Weight(name=name, shape=size, role=role, tensor_dim=dim, added=True))
        return found

    def _extent(self) -> Extent:
        config, degrees = self._config, self._degrees
        chunk = CPU_CHUNK_TOKENS if config.device == "cpu" else GPU_CHUNK_TOKENS
        return Extent(
            rows=self.rows.micro_batch_size,
            length=config.training.seq_len // degrees.cp,
            itemsize=self._param,
            stream_parts=degrees.tp if config.parallel.sequence_parallel else 1,
            inner_parts=degrees.tp,
            expert_parts=degrees.ep,
            confined=config.data.confine_attention and config.model.attention_kernel == "sdpa",
            chunk_tokens=config.model.loss_chunk_tokens or chunk,
            frozen=bool(config.lora.rank),
            adapters=dict.fromkeys(config.lora.roles, config.lora.rank) if config.lora.rank else {},
        )

    def _cut(self) -> list[dict[int, list[str]]]:
        """For each pipeline rank: number of a stage -> its outermost modules, in the model's order."""
        layers = [f"layers.{layer}" for layer in range(self._model.layers)]
        pieces = ["tok_embeddings", *layers, "norm", "lm_head"]
        if self._degrees.pp == 1:
            return [{0: pieces}]
        roles = {piece: "block" if piece in layers else self._model.roles()[piece] for piece in pieces}
        costs = flops_per_token(self._model, self._config.training.seq_len)
        names, ranks = stage_names(roles, self._config.parallel, costs), stage_ranks(self._config.parallel)
        return [
            {number: names[number] for number, holder in enumerate(ranks) if holder == rank}
            for rank in range(self._degrees.pp)
        ]

    def _within(self, module: str) -> list[str]:
        return self._members.get(module, [])

    def _recomputed(self, modules: Mapping[int, Sequence[str]]) -> set[str]:
        """The blocks of a rank that compute their activations twice."""
        remat = self._config.remat
        blocks = [name for names in modules.values() for name in names if name.startswith("layers.")]
        return set(blocks[:: remat.every]) if remat.mode in ("full", "selective") else set()

    def _stage(self, modules: Sequence[str], recomputed: Collection[str]) -> StageUnits:
        """A stage, whose last norm and head are one unit, with the embedding if they share its weight."""
        first, last = modules[0] == "tok_embeddings", modules[-1] == "lm_head"
        blocks = [name for name in modules if name.startswith("layers.")]
        default = self._config.parallel.reshard_after_forward == "default"
        tail = groups_of(self._weights[fqn] for name in modules[-2:] for fqn in self._within(name)) if last else ()
        front = groups_of(self._weights[fqn] for fqn in self._within("tok_embeddings")) if first else ()
        tied = first and last and self._model.tie_embeddings
        if tied:
            both = ("tok_embeddings", "norm")
            front = tail = groups_of(self._weights[fqn] for name in both for fqn in self._within(name))
        if not self._fsdp:
            front = tail = ()
        units = []
        if first:
            stays = default and (tied or not last)
            units.append(Unit(part=self._played.embedding(), groups=front, stays=stays, adds=tied))
        # A frozen embedding's result needs no gradient, so that the first block is spared some.
        flows = not (first and self._config.lora.rank)
        mode = "full" if self._config.remat.mode == "full" else "selective"
        for i, block in enumerate(blocks):
            layer = int(block.rpartition(".")[2])
            part = self._played.block(
                layer,
                needs_gradient=flows or i > 0,
                remat=mode if block in recomputed else "none",
                lent=i == 0 and not first,
                gradient_lent=i == len(blocks) - 1 and not last,
            )
            groups = groups_of(self._weights[fqn] for fqn in self._within(block)) if self._fsdp else ()
            units.append(Unit(part=part, groups=groups, prefetches=self._model.has_experts(layer)))
        if last:
            units.append(Unit(part=self._played.head(), groups=tail, stays=default))
        return StageUnits(
            units=tuple(units),
            alongside=self._played.rope_table(),
            received=0 if first else self._played.hidden,
            handed_on=0 if last else self._played.hidden,
        )

    def _held(self, weights: Sequence[LocalWeight], own: set[str]) -> Bytes:
        elements = sum(math.prod(weight.shard) for weight in weights)
        copies = 0 if self._fsdp or self._param == self._master else elements * self._param
        trained = [weight for weight in weights if weight.weight.trained]
        return {
            "parameters": elements * self._master + self._buffers(own),
            "optimizer": sum(adamw_state_bytes(w, self._config.optimizer, self._master) for w in trained),
            "communication": copies,
            "other": self._batch(),
        }

    def _buffers(self, own: set[str]) -> int:
        moe = self._model.moe
        routers = sum(fqn.endswith("router.gate.weight") for fqn in own)
        return 0 if moe is None else routers * moe.experts * (_INT64 + 4 * bool(moe.bias_update_rate))

    def _batch(self) -> int:
        names = 3 + self._config.data.confine_attention
        length = self._config.training.seq_len
        own = length // self._degrees.cp if self._degrees.cp > 1 else 0
        weights = _INT64 * self.rows.rows if self._model.moe is not None else 0
        return self.rows.rows * (length + own) * names * _INT64 + weights

    def _update(self, weights: Sequence[LocalWeight], held: Bytes) -> Bytes:
        """While the optimizer works."""
        trained = [weight for weight in weights if weight.weight.trained]
        gradients = sum(math.prod(weight.shard) for weight in trained) * self._master
        working = adamw_working_bytes(trained, self._config.optimizer, self._master)
        return {**held, "gradients": gradients, "other": held["other"] + working}

    def _policy(self) -> Policy:
        parallel, degrees = self._config.parallel, self._degrees
        pipeline = degrees.pp > 1
        reshards = parallel.reshard_after_forward == "always" or (
            parallel.reshard_after_forward == "default" and not pipeline
        )
        last = parallel.grad_sync == "last" or (parallel.grad_sync == "auto" and degrees.dp_shard * degrees.cp == 1)
        return Policy(
            master=self._master,
            param=self._param,
            reduce=self._reduce,
            fsdp=self._fsdp,
            reshards=reshards,
            reduces_last=last,
            replicas=degrees.dp_replicate,
            replicas_last=parallel.grad_sync != "every",
            pipeline=pipeline,
        )

    def _actions(self, pipeline_rank: int) -> list[Computation]:
        if self._degrees.pp > 1:
            return rank_order(self._config.parallel, pipeline_rank, self.rows.micro_batches)
        # A third micro-batch holds what the second does, and gradients exist since the first.
        return [(0, kind, i) for i in range(min(self.rows.micro_batches, 3)) for kind in "FB"]
