import os
import sys
from pathlib import Path

import pytest

from titan_metrics.probes import disk
from titan_metrics.probes.disk import disk_speed

SIZE = 12 * 2**20 + 5  # not whole chunks


def counted(name):
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_all_bytes_are_written_and_read_and_nothing_stays(tmp_path):
    before = {name: counted(name) for name in ("rchar", "wchar")} if sys.platform == "linux" else {}
    speed = disk_speed(tmp_path, SIZE)
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []
    for name, count in before.items():
        assert SIZE <= counted(name) - before[name] < SIZE + 2**20, (name, count)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what came from the disk")
def test_reading_is_from_the_disk_and_not_from_the_page_cache(tmp_path):
    if os.statvfs(tmp_path).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("the temporary folder is in memory")
    before = counted("read_bytes")
    disk_speed(tmp_path, SIZE)
    assert counted("read_bytes") - before >= SIZE * 0.9


def test_the_disk_has_all_of_it_before_the_clock_stops(tmp_path, monkeypatch):
    events = []
    real = os.fsync
    monkeypatch.setattr(disk.os, "fsync", lambda file: (real(file), events.append("sync")))
    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: (events.append("clock"), next(clock))[1])
    speed = disk_speed(tmp_path, SIZE)
    assert events == ["clock", "sync", "clock", "clock", "clock"]
    assert (speed.write, speed.read) == (SIZE / 2, SIZE)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        disk_speed(tmp_path / "missing", SIZE)
