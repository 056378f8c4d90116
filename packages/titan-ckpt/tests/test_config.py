import dataclasses
import subprocess
import sys

import pytest

from titan_ckpt.config import CheckpointConfig


def test_the_defaults_save_regularly_and_resume_from_what_is_there() -> None:
    config = CheckpointConfig()
    assert (config.enabled, config.every, config.keep_latest) == (True, 500, 2)
    assert (config.resume, config.verify_hashes, config.asynchronous) == ("auto", True, True)
    assert config.problems() == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.every = 1  # type: ignore[misc]  # what is tested


def test_every_value_out_of_range_is_named_with_a_remedy() -> None:
    config = CheckpointConfig(
        every=-1,
        every_minutes=float("nan"),
        keep_latest=1,
        permanent_every=-2,
        permanent_steps=(0, 5),
        resume="maybe",  # type: ignore[arg-type]  # what is tested
        init_from="",
    )
    found = config.problems()
    for name in (
        "every is",
        "every_minutes",
        "permanent_every",
        "keep_latest",
        "permanent_steps",
        "resume",
        "init_from",
    ):
        assert sum(problem.startswith(f"checkpoint.{name}") for problem in found) == 1
    assert len(found) == 7
    assert "one alone may turn out damaged" in "".join(found)
    assert CheckpointConfig(keep_latest=0, permanent_steps=(1,)).problems() == []
    assert len(CheckpointConfig(keep_latest=-1).problems()) == 1


def test_config_and_errors_need_no_torch_and_the_checkpointer_no_dcp() -> None:
    code = (
        "import sys, titan_ckpt.cadence, titan_ckpt.config, titan_ckpt.errors\n"
        "assert 'torch' not in sys.modules\n"
        "import titan_ckpt.checkpointer\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
