import dataclasses
import subprocess
import sys

import pytest

from titan_ckpt.config import CheckpointConfig


def test_the_defaults_save_regularly_and_resume_from_what_is_there() -> None:
    config = CheckpointConfig()
    assert (config.enabled, config.every, config.keep_latest) == (True, 500, 2)
    assert (config.resume, config.verify_hashes) == ("auto", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.every = 1  # type: ignore[misc]  # what is tested


def test_config_and_errors_need_no_torch_and_the_checkpointer_no_dcp() -> None:
    code = (
        "import sys, titan_ckpt.config, titan_ckpt.errors\n"
        "assert 'torch' not in sys.modules\n"
        "import titan_ckpt.checkpointer\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
