"""One small experiment on any layout: losses, gradient norms, every gradient by name, parameters at the end.

Plain SGD, since AdamW turns rounding of gradients near zero into steps of full size.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ranks import run_ranks
from titan_core.clip import gradient_norm
from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import resolve_degrees
from titan_core.init import init_parameters, materialize
from titan_core.layout import Layout
from titan_core.mesh import Meshes, build_meshes, data_rank, sum_over
from titan_core.optim import ModelState
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles
from titan_models.config import DecoderConfig
from titan_models.facts import flops_per_token
from titan_models.families.llama3 import Llama3Config
from titan_models.shape import MoEConfig

DENSE = Llama3Config(vocab_size=96, dim=32, layers=4, heads=4, kv_heads=2, head_dim=8, hidden_dim=48)
MIXTURE = dataclasses.replace(
    DENSE,
    qk_norm=True,
    moe=MoEConfig(
        experts=8,
        top_k=2,
        hidden_dim=24,
        shared_hidden_dim=16,
        first_dense_layers=1,
        balance_loss=0.1,
        z_loss=0.01,
        bias_update_rate=0.01,
    ),
)
ROWS, LENGTH, LR = 8, 16, 1e-3


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is computed; `layout` in `run` says how."""

    model: DecoderConfig = DENSE
    dtype: torch.dtype = torch.float64
    param_dtype: torch.dtype | None = None
    steps: int = 3
    micro_batch_size: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What an experiment gave."""

    losses: list[float]
    norms: list[float]
    evaluation: float
    """The loss on the last batch, without gradients, after the last step."""
    gradients: dict[str, np.ndarray]
    """Of the first step."""
    parameters: dict[str, np.ndarray]
    """After the last."""
    loads: dict[str, np.ndarray]
    """Tokens of the last step to each expert, by router."""


def batches(experiment: Experiment) -> list[dict[str, torch.Tensor]]:
    """Global batches of packed documents with some labels ignored, and a whole row of them in the second batch."""
    generator = torch.Generator().manual_seed(experiment.seed)
    found = []
    for step in range(experiment.steps):
        tokens = torch.randint(0, experiment.model.vocab_size, (ROWS, LENGTH + 1), generator=generator)
        starts = torch.rand((ROWS, LENGTH), generator=generator) < 0.15
        starts[:, 0] = True
        ids = starts.cumsum(1) - 1
        index = torch.arange(LENGTH).expand(ROWS, LENGTH)
        first = torch.where(starts, index, 0).cummax(1).values
        labels = tokens[:, 1:].clone()
        labels[torch.rand((ROWS, LENGTH), generator=generator) < 0.1] = -100
        if step == 1:
            labels[3] = -100
        found.append({"tokens": tokens[:, :-1], "positions": index - first, "document_ids": ids, "labels": labels})
    return found


def run(
    experiment: Experiment,
    world_size: int = 1,
    layout: ParallelConfig = ParallelConfig(),
    *,
    remat: RematConfig = RematConfig(),
    compiling: CompileConfig = CompileConfig(),
) -> Outcome:
    """Runs the experiment on so many forked ranks, or here, and merges what they hold."""
    if world_size == 1:
        return run_here(experiment, 1, layout, remat, compiling)
    return merged(run_ranks(world_size, run_here, experiment, world_size, layout, remat, compiling, timeout=120))


def merged(outcomes: Sequence[Outcome]) -> Outcome:
    """What the ranks agree on, and the tensors of all."""
    tensors: dict[str, dict[str, np.ndarray]] = {"gradients": {}, "parameters": {}, "loads": {}}
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses, (outcome.losses, outcomes[0].losses)
        assert outcome.norms == outcomes[0].norms, (outcome.norms, outcomes[0].norms)
        assert outcome.evaluation == outcomes[0].evaluation
        for kind, found in tensors.items():
            for name, array in getattr(outcome, kind).items():
                assert np.array_equal(found.setdefault(name, array), array), f"ranks differ in {kind} of {name}"
    return dataclasses.replace(outcomes[0], **tensors)


def lay_out(
    experiment: Experiment, world_size: int, layout: ParallelConfig, remat: RematConfig, compiling: CompileConfig
) -> tuple[Layout, Meshes | None]:
    """The experiment's model laid out on this rank, without memory yet, and the meshes."""
    degrees = resolve_degrees(layout, world_size)
    experts = experiment.model.moe is not None
    meshes = build_meshes(degrees, "cpu", experts=experts) if world_size > 1 else None
    with torch.device("meta"):
        model = experiment.model.build().to(experiment.dtype)
    roles = resolve_roles(model, experiment.model.roles())
    param_dtype = experiment.param_dtype or experiment.dtype
    laid_out = parallelize(
        model,
        roles,
        meshes,
        layout,
        micro_batch_size=experiment.micro_batch_size,
        param_dtype=param_dtype,
        reduce_dtype=experiment.dtype,
        remat=remat,
        compiling=compiling,
        costs=flops_per_token(experiment.model, LENGTH),
        costly=experiment.model.costly_operators(),
    )
    return laid_out, meshes


def run_here(
    experiment: Experiment, world_size: int, layout: ParallelConfig, remat: RematConfig, compiling: CompileConfig
) -> Outcome:
    """Runs this rank's part of the experiment."""
    laid_out, meshes = lay_out(experiment, world_size, layout, remat, compiling)
    degrees = resolve_degrees(layout, world_size)
    model = laid_out.model
    materialize(model, torch.device("cpu"))
    init_parameters(model, experiment.model.init_rules(), experiment.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, norms, gradients = [], [], {}
    for batch in batches(experiment):
        valid = int((batch["labels"] != -100).sum())
        if experiment.model.moe is not None:
            batch["row_weights"] = (batch["labels"] != -100).sum(1, dtype=torch.float64) / valid
        rank = data_rank(meshes.data) if meshes else 0
        own = {name: tensor.chunk(degrees.dp)[rank] for name, tensor in batch.items()}
        loss = laid_out.accumulate(own, divisor=valid)
        if meshes is not None:
            sum_over(loss, meshes.data)
        losses.append(loss.item())
        stages = meshes.group("pp") if meshes is not None and degrees.pp > 1 else None
        norms.append(gradient_norm(model.parameters(), stages).item())
        gradients = gradients or {name: _whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        laid_out.routers.finish_step()
    kinds = {name: type(p) for name, p in model.named_parameters()}
    evaluation = laid_out.evaluate({name: rows for name, rows in own.items() if name != "row_weights"})
    assert {name: type(p) for name, p in model.named_parameters()} == kinds, "parameters stay gathered"
    if meshes is not None:
        sum_over(evaluation, meshes.data)
    parameters = {name: _whole(tensor) for name, tensor in ModelState(model).state_dict().items()}
    loads = {name: _whole(load) for name, load in laid_out.routers.loads.items()}
    return Outcome(losses, norms, evaluation.item(), gradients, parameters, loads)


def _whole(tensor: Any) -> np.ndarray:
    assert tensor is not None, "a parameter has no gradient"
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().numpy()
