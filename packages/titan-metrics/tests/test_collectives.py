import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_metrics.collectives import find_stuck, leave_nccl_dumps, read_records, write_record


def entry(number, *, group="0", under_way=False, operation="nccl:all_reduce", p2p=False):
    return {
        "process_group": [group, "dp"],
        "collective_seq_id": number,
        "profiling_name": operation,
        "input_sizes": [[4, 2]],
        "input_dtypes": ["Float"],
        "state": "started" if under_way else "completed",
        "retired": not under_way,
        "is_p2p": p2p,
    }


def record(folder, rank, *entries, groups=None):
    content = {"entries": list(entries), "titan": {"rank": rank, "groups": groups or {"0": [0, 1, 2]}}}
    (folder / f"collectives-rank-{rank}-step-3.json").write_text(json.dumps(content))


def stuck(folder, alive=None):
    return [(found.call.number, found.waiting, found.missing) for found in find_stuck(read_records(folder), alive)]


def test_ranks_that_have_not_called_what_others_wait_in_are_missing(tmp_path):
    record(tmp_path, 0, entry(1), entry(2, under_way=True))
    record(tmp_path, 1, entry(1))
    record(tmp_path, 2, entry(1), entry(2, under_way=True))
    assert stuck(tmp_path) == [(2, (0, 2), (1,))]
    (found,) = find_stuck(read_records(tmp_path))
    assert str(found) == (
        "ranks 0, 2 wait in nccl:all_reduce number 2 of group 0 (dp), of float [4, 2]; not there: rank 1"
    )


def test_a_rank_without_a_record_is_missing_unless_it_is_alive(tmp_path):
    record(tmp_path, 0, entry(1, under_way=True))
    record(tmp_path, 1, entry(1, under_way=True))
    assert stuck(tmp_path) == [(1, (0, 1), (2,))]
    assert stuck(tmp_path, alive=[0, 1, 2]) == [(1, (0, 1), ())]


def test_a_rank_that_is_already_further_is_not_missing(tmp_path):
    record(tmp_path, 0, entry(1, under_way=True))
    record(tmp_path, 1, entry(5))  # its ring buffer has forgotten number 1
    record(tmp_path, 2)
    assert stuck(tmp_path) == [(1, (0,), (2,))]


def test_only_the_groups_own_ranks_count_and_the_emptiest_comes_first(tmp_path):
    groups = {"0": [0, 1, 2], "tp": [0, 1]}
    record(tmp_path, 0, entry(9, group="tp", under_way=True), groups=groups)
    record(tmp_path, 1, entry(9, group="tp", under_way=True), entry(4, under_way=True), groups=groups)
    record(tmp_path, 2, entry(4, under_way=True))
    found = find_stuck(read_records(tmp_path))
    assert [(one.call.group, one.missing) for one in found] == [("0", (0,)), ("tp", ())]


def test_messages_are_no_collectives(tmp_path):
    record(tmp_path, 0, entry(1, under_way=True, p2p=True))
    assert stuck(tmp_path) == []


def test_the_newest_record_of_a_rank_counts_and_old_ones_can_be_left_out(tmp_path):
    record(tmp_path, 0, entry(1, under_way=True))
    old = tmp_path / "collectives-rank-0-step-1.json"
    (tmp_path / "collectives-rank-0-step-3.json").rename(old)
    os.utime(old, (1000.0, 1000.0))
    assert len(read_records(tmp_path)) == 1
    assert read_records(tmp_path, since=2000.0) == []
    record(tmp_path, 0, entry(2, under_way=True))
    assert stuck(tmp_path) == [(2, (0,), (1, 2))]


def test_what_nccl_left_is_read_and_code_in_it_is_not_run(tmp_path, monkeypatch):
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    leave_nccl_dumps(tmp_path)
    path = Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + "1")
    content = {
        "entries": [entry(7, under_way=True)],
        "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}},
    }
    path.write_bytes(pickle.dumps(content))
    assert stuck(tmp_path) == [(7, (1,), (0,))]
    path.write_bytes(pickle.dumps({"entries": os.system}))
    with pytest.raises(pickle.UnpicklingError, match="no business"):
        read_records(tmp_path)


def test_gloos_own_record_names_the_collective_and_the_missing_rank(tmp_path):
    def train():
        rank, x = dist.get_rank(), torch.ones(3, 2)
        group = dist.new_group([0, 1], group_desc="data")
        dist.all_reduce(x, group=group)
        if rank == 0:
            work = dist.all_reduce(x, group=group, async_op=True)
        write_record(tmp_path / f"collectives-rank-{rank}-step-5.json", rank)
        if rank == 1:
            while not (tmp_path / "collectives-rank-0-step-5.json").exists():
                time.sleep(0.01)
            dist.all_reduce(x, group=group)
        else:
            work.wait()

    run_ranks(2, train)
    found = find_stuck(read_records(tmp_path))[0]  # gloo may not have noted yet that the one before is over
    assert (found.waiting, found.missing) == ((0,), (1,))
    assert (found.call.operation, found.call.description, found.call.number) == ("gloo:all_reduce", "data", 2)
    assert found.call.shapes == "float [3, 2]"
