import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from titan_ckpt.checkpoint import Checkpoint, open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError


def content() -> dict[str, Any]:
    return {
        "w": {"kept": torch.ones(2), "gone": torch.ones(3), "reshaped": torch.ones(4), "cast": torch.ones(5)},
        "kept": 1,
        "gone": 2,
        "pair": (1, [2, 3]),
    }


def other_content() -> dict[str, Any]:
    return {
        "w": {
            "kept": torch.zeros(2),
            "new": torch.zeros(3),
            "reshaped": torch.zeros(5),
            "cast": torch.zeros(5, dtype=torch.bfloat16),
        },
        "kept": 0,
        "new": 0,
        "pair": (0, []),
    }


def save(directory: Path, state: dict[str, Any], **more: Any) -> tuple[Checkpointer, Checkpoint]:
    checkpointer = Checkpointer(directory)
    return checkpointer, open_checkpoint(checkpointer.save(1, state, **more))


def test_tensors_and_values_come_back(tmp_path: Path, box: Any) -> None:
    checkpointer, checkpoint = save(tmp_path, {"a": box(content())})
    target = box(content())
    target.content["w"]["kept"].zero_()
    target.content |= {"kept": 0, "pair": (0, [])}
    in_place = target.content["w"]["kept"]
    checkpointer.load(checkpoint, {"a": target})
    assert in_place.tolist() == [1, 1]
    assert (target.content["kept"], target.content["pair"]) == (1, (1, [2, 3]))


def test_every_difference_is_listed_and_nothing_is_touched(tmp_path: Path, box: Any) -> None:
    checkpointer, checkpoint = save(tmp_path, {"a": box(content()), "b": box({"x": 1, "t": torch.ones(1)})})
    target = box(other_content())
    before = copy.deepcopy(target.content)
    with pytest.raises(CheckpointError) as raised:
        checkpointer.load(checkpoint, {"a": target, "c": box({"y": 1})})
    message = str(raised.value)
    assert "Not in it: a.new, a.w.new, c.y." in message
    assert "In it, but not asked for: a.gone, a.w.gone, b.*." in message
    assert "a.w.cast (saved as float32 [5], is bfloat16 [5])" in message
    assert "a.w.reshaped (saved as float32 [4], is float32 [5])" in message
    assert "kept" not in message
    assert str(target.content) == str(before)


def test_what_is_skipped_is_not_missed(tmp_path: Path, box: Any) -> None:
    checkpointer, checkpoint = save(
        tmp_path, {"a": box({"x": 1}), "b": box({"x": 2, "t": torch.ones(1)})}, per_rank={"rng": box({"x": 3})}
    )
    target = box({"x": 0})
    checkpointer.load(checkpoint, {"a": target}, skip=["b", "rng"])
    assert target.content == {"x": 1}


def test_a_tensor_without_memory_is_refused(tmp_path: Path, box: Any) -> None:
    checkpointer, checkpoint = save(tmp_path, {"a": box({"t": torch.ones(1)})})
    with pytest.raises(CheckpointError, match="its device is meta"):
        checkpointer.load(checkpoint, {"a": box({"t": torch.ones(1, device="meta")})})


def test_a_difference_on_one_rank_is_an_error_on_all(tmp_path: Path, box: Any) -> None:
    save(tmp_path, {"a": box({"t": torch.ones(1), "u": torch.ones(1)})})

    def load(*wanted: str) -> str:
        checkpointer = Checkpointer(tmp_path)
        checkpoint = open_checkpoint(tmp_path / "step-1")
        rank = torch.distributed.get_rank()
        target = box({wanted[rank]: torch.zeros(1)})
        try:
            checkpointer.load(checkpoint, {"a": target})
        except CheckpointError as error:
            return str(error)
        return str(target.content)

    one, two = run_ranks(2, load, "t", "v")
    assert one == two
    assert "Not in it: a.v. In it, but not asked for: a.u." in one
    # Together the ranks ask for everything, as pipeline stages do.
    assert run_ranks(2, load, "t", "u") == ["{'t': tensor([1.])}", "{'u': tensor([1.])}"]


def test_a_failing_object_is_an_error_that_says_what_to_do(tmp_path: Path, box: Any) -> None:
    class Failing(box):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise KeyError("oh")

    checkpointer, checkpoint = save(tmp_path, {"a": box({"x": 1})})
    with pytest.raises(CheckpointError, match=r"KeyError: 'oh'.*don't go on with them"):
        checkpointer.load(checkpoint, {"a": Failing({"x": 0})})
