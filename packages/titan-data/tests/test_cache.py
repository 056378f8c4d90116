import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from ranks import run_ranks
from titan_data.cache import DamagedError, cache_directory, find_or_build
from titan_data.errors import DataError, NotFoundError


def open_folder(folder):
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    content = (folder / "content").read_text()
    if content != "whole":
        raise DamagedError(f"content is {content!r}")
    return content


def build(folder):
    (folder / "content").write_text("who")
    with (folder / "content").open("a") as file:
        file.write("le")


def find(folder, build=build, messages=None, resume=False):
    say = (lambda message: None) if messages is None else messages.append
    return find_or_build(folder, open_folder=open_folder, build=build, what="thing", progress=say, resume=resume)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "things" / "key"


def test_builds_once(folder):
    built = []

    def building(scratch):
        built.append(scratch)
        build(scratch)

    assert [find(folder, building) for _ in range(3)] == ["whole"] * 3
    assert len(built) == 1
    assert built[0] != folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "key.lock"]


def test_processes_that_start_together_build_once_and_all_open_it(folder):
    def rank():
        built, messages = [], []

        def building(scratch):
            built.append(scratch)
            time.sleep(0.3)
            build(scratch)

        return find(folder, building, messages), len(built), messages

    results = run_ranks(4, rank)
    assert [content for content, _, _ in results] == ["whole"] * 4
    assert sum(built for _, built, _ in results) == 1
    assert any(
        "waiting for another process that prepares the thing" in m for _, _, messages in results for m in messages
    )


def test_what_a_killed_builder_left_is_built_anew(folder):
    def killed_half_way(scratch):
        (scratch / "content").write_text("who")
        (scratch / "litter").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        find(folder, killed_half_way)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not folder.exists()
    assert folder.with_name("key.partial").exists()
    assert find(folder) == "whole"
    assert [path.name for path in folder.iterdir()] == ["content"]
    assert not folder.with_name("key.partial").exists()


def test_an_interrupted_build_may_go_on_but_a_failed_one_starts_over(folder):
    def stopping(error):
        def build(scratch):
            (scratch / "content").write_text("who")
            raise error

        return build

    def going_on(scratch):
        assert [path.name for path in scratch.iterdir()] == ["content"]
        with (scratch / "content").open("a") as file:
            file.write("le")

    with pytest.raises(DataError, match="broken corpus"):
        find(folder, stopping(DataError("broken corpus")), resume=True)
    assert not folder.with_name("key.partial").exists()
    with pytest.raises(KeyboardInterrupt):
        find(folder, stopping(KeyboardInterrupt()), resume=True)
    assert find(folder, going_on, resume=True) == "whole"


def test_a_damaged_folder_is_built_again_with_a_notice(folder):
    find(folder)
    (folder / "content").write_text("wh")
    messages = []
    assert find(folder, messages=messages) == "whole"
    assert any("is damaged (content is 'wh'); building it again" in message for message in messages)


def test_a_failed_build_leaves_nothing(folder):
    def failing(scratch):
        (scratch / "content").write_text("who")
        raise DataError("broken corpus")

    with pytest.raises(DataError, match="broken corpus"):
        find(folder, failing)
    assert [path.name for path in folder.parent.iterdir()] == ["key.lock"]
    assert find(folder) == "whole"


def test_a_full_disk_is_explained_and_frees_what_it_took(folder):
    def filling(scratch):
        (scratch / "content").write_text("who")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"cannot write the cache .*No space left on device.*TITAN_CACHE"):
        find(folder, filling)
    assert not folder.with_name("key.partial").exists()


def test_a_place_where_nothing_can_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot write the cache .*/file: File exists\. .*data\.cache_dir"):
        find(tmp_path / "file" / "key")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_a_place_where_no_folder_can_be_made_is_explained():
    with pytest.raises(DataError, match=r"cannot write the cache /proc/nope: No such file or directory\. "):
        find(Path("/proc/nope/key"))


def test_a_file_that_may_not_grow_is_explained_by_name(folder):
    def filling(scratch):
        (scratch / "content").write_bytes(b"x" * 5000)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write the cache .*things/key: File too large\. "):
            find(folder, filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", [DataError, NotFoundError])
def test_errors_of_what_is_read_pass(folder, kind):
    def failing(scratch):
        raise kind("corpus: bad disk")

    with pytest.raises(kind, match=r"^corpus: bad disk$"):
        find(folder, failing)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("TITAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory(None) == Path("/home/me/.cache/titan")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory(None) == Path("/xdg/titan")
    monkeypatch.setenv("TITAN_CACHE", "~/titan")
    assert cache_directory(None) == Path("/home/me/titan")
    assert cache_directory("/here") == Path("/here")
    with pytest.raises(DataError, match=r"data\.cache_dir is empty"):
        cache_directory("")
