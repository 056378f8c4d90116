import dataclasses
import os

import pytest

from titan_train.configs.llama3 import llama3_debug
from titan_train.environment import environment


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_large_tensors_lie_in_huge_pages_on_a_cpu_unless_the_user_says_otherwise(monkeypatch, own, expected):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", own or "")  # what it was before comes back in the end
    if own is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    with environment(dataclasses.replace(llama3_debug(), device="cpu")) as env:
        assert env.device.type == "cpu"
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected
