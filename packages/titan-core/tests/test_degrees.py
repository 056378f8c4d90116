import subprocess
import sys

import pytest

from titan_core.config import ParallelConfig
from titan_core.degrees import LayoutError, degree_problems, resolve_degrees


def test_dp_shard_takes_what_is_left():
    degrees = resolve_degrees(ParallelConfig(dp_replicate=2), 8)
    assert (degrees.dp_replicate, degrees.dp_shard, degrees.dp, degrees.world_size) == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (ParallelConfig(tp=3), 4, r"parallel\.tp 3 does not divide the 4 ranks; use one of \[1, 2, 4\]"),
        (ParallelConfig(dp_shard=3), 4, r"parallel\.dp_shard 3 does not divide the 4 ranks"),
        (
            ParallelConfig(dp_shard=2),
            4,
            r"dp_shard 2 is a layout for 2 ranks, not for 4 ranks; set parallel\.dp_shard to -1",
        ),
        (
            ParallelConfig(dp_shard=1),
            8,
            r"all degrees 1 is a layout for 1 rank, not for 8 ranks.*or use 1 rank \(torchrun",
        ),
        (
            ParallelConfig(dp_replicate=2, dp_shard=4),
            4,
            r"dp_replicate 2 x dp_shard 4 is a layout for 8 ranks, not for 4 ranks; set",
        ),
        # What is left would be nothing whole.
        (ParallelConfig(dp_replicate=4, tp=4, dp_shard=1), 8, r"for 16 ranks, not for 8 ranks; lower a degree, or use"),
        (ParallelConfig(dp_shard=0), 4, r"parallel\.dp_shard is 0; it must be -1 \(what is left\) or at least 1"),
        (ParallelConfig(pp=-2), 4, r"parallel\.pp is -2; it must be at least 1"),
        (ParallelConfig(pp=2, ep=4), 4, r"parallel\.ep 4 does not divide the 2 ranks of dp_shard x cp x tp.*\[1, 2\]"),
    ],
)
def test_impossible_degrees_are_refused_by_name(config, world_size, message):
    with pytest.raises(LayoutError, match=message):
        resolve_degrees(config, world_size)


def test_every_offending_degree_is_listed():
    assert len(degree_problems(ParallelConfig(tp=3, pp=5, dp_replicate=0), 4)) == 3


def test_layouts_can_be_checked_without_torch():
    code = "import sys, titan_core.degrees; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
