import os
import resource
import sys

from titan_metrics.probes.host import describe_host, differences


def test_a_host_says_what_it_has(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    host = describe_host()
    assert host["variables"]["NCCL_DEBUG"] == "INFO"
    assert host["limits"]["open files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 1 <= host["cores_allowed"] <= os.cpu_count()
    if sys.platform == "linux":
        assert 0 < host["memory_available_bytes"] <= host["memory_bytes"]
        assert 0 <= host["shared_memory_free_bytes"] <= host["shared_memory_bytes"]
    assert host["libraries"]["numpy"]
    assert "pytest" not in host["libraries"]


def test_what_a_rank_has_alone_is_said_and_what_differs_by_nature_is_not():
    usual = {"torch": "2.13.0", "host": "a", "devices": ["H100"], "variables": {"RANK": "0", "NCCL_IB_DISABLE": "0"}}
    other = {"torch": "2.13.0", "host": "b", "devices": ["A100"], "variables": {"RANK": "1"}}
    assert differences([usual, usual | {"host": "c"}, other]) == [
        'devices: ["A100"] on rank 2; ["H100"] on most others',
        "variables.NCCL_IB_DISABLE: unset on rank 2; 0 on most others",
    ]
    assert differences([usual, usual]) == []
