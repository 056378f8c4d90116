import os
import time

from titan_metrics.heartbeats import Heartbeat, find_dead, read_heartbeats, remove_heartbeat, write_heartbeat


def test_what_is_written_is_read_until_it_is_removed(tmp_path):
    before = time.time()
    for rank, step in ((0, 3), (2, 4), (2, 5)):
        write_heartbeat(tmp_path, rank, step)
    beats = read_heartbeats(tmp_path)
    assert {rank: (beat.step, beat.process) for rank, beat in beats.items()} == {
        0: (3, os.getpid()),
        2: (5, os.getpid()),
    }
    assert before <= beats[2].time <= time.time()
    remove_heartbeat(tmp_path, 0)
    remove_heartbeat(tmp_path, 0)
    assert read_heartbeats(tmp_path).keys() == {2}


def test_the_dead_are_those_that_were_not_heard_of():
    beats = {rank: Heartbeat(rank, "h", 1, 5, time=100.0 + rank) for rank in range(3)}
    assert [beat.rank for beat in find_dead(beats, now=104.5, after_seconds=3.0)] == [0, 1]
