import dataclasses

import pytest

from titan_core.replicas.config import AveragingConfig, ReplicaConfig

DILOCO = AveragingConfig(method="diloco", every=12, fragments=3)


@pytest.mark.parametrize(
    "config",
    [
        ReplicaConfig(),
        ReplicaConfig(groups=3, group=2, min_groups=2),
        ReplicaConfig(groups=2, averaging=DILOCO),
        ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, groups=2)),
        ReplicaConfig(groups=2, averaging=AveragingConfig(method="local_sgd", every=5)),
    ],
)
def test_what_can_run_has_no_problems(config):
    assert config.problems() == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ReplicaConfig(groups=0), "replica.groups is 0"),
        (ReplicaConfig(min_groups=2), "no effect with one group"),
        (ReplicaConfig(averaging=DILOCO), "needs several groups"),
        (ReplicaConfig(groups=2, group=2), "with 2 groups it is 0 to 1"),
        (ReplicaConfig(groups=2, min_groups=3), "between 1 and 2"),
        (ReplicaConfig(groups=2, timeout_seconds=0.0), "replica.timeout_seconds is 0.0"),
        (ReplicaConfig(groups=2, join_seconds=float("nan")), "replica.join_seconds is nan"),
        (ReplicaConfig(groups=2, bucket_bytes=0), "replica.bucket_bytes is 0"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, groups=3)), "start as many groups"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, fragments=5)), "does not divide"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, every=0, fragments=1)), "every is 0"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, outer_lr=0.0)), "outer_lr is 0.0"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, outer_momentum=1.0)), "outer_momentum is 1.0"),
        (ReplicaConfig(groups=2, averaging=dataclasses.replace(DILOCO, method="local_sgd")), "are diloco's"),
        (ReplicaConfig(groups=2, averaging=AveragingConfig(every=5)), "no effect without --replica.averaging.method"),
    ],
)
def test_what_cannot_is_named(config, says):
    (problem,) = config.problems()
    assert says in problem


def test_only_averaging_changes_the_curve():
    parts = {field.name: field.metadata.get("part") for field in dataclasses.fields(ReplicaConfig)}
    assert [name for name, part in parts.items() if part is None] == ["averaging"]
    assert DILOCO.interval == 4
