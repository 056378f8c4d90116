import os
import subprocess
import sys

import pytest

from titan_data.threads import library_threads, one_thread, thread_count

VARIABLE = "TOKENIZERS_PARALLELISM"

FORK_AFTER_USE = """
import os, sys
from pathlib import Path
from titan_data.tokenizer_files import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
tokenizer.encode_batch(["some text"] * 100)
pid = os.fork()
if pid == 0:
    tokenizer.encode_batch(["some text"] * 100)
    os._exit(0)
print(os.waitpid(pid, 0)[1], os.environ["TOKENIZERS_PARALLELISM"])
"""


@pytest.mark.parametrize(("chosen", "left"), [(None, "false"), ("true", "true"), ("false", "false")])
def test_a_fork_after_use_is_quiet_and_does_not_hang(bpe_folder, chosen, left):
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env |= {"RAYON_NUM_THREADS": "2"} | ({"TOKENIZERS_PARALLELISM": chosen} if chosen else {})
    if chosen == "true":
        code = FORK_AFTER_USE.replace("    tokenizer.encode_batch", "    tokenizer.decode([1]) #")
    else:
        code = FORK_AFTER_USE
    run = subprocess.run(
        [sys.executable, "-c", code, str(bpe_folder)], env=env, capture_output=True, text=True, timeout=30
    )
    assert run.stderr == ""
    assert run.stdout.split() == ["0", left]


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.setattr("titan_data.threads._set_by", None)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.usefixtures("unset")
def test_there_is_a_thread_for_each_core_unless_the_user_says_no(monkeypatch):
    cores = thread_count()
    assert cores == len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores >= 1
    with library_threads():
        assert os.environ[VARIABLE] == "true"
    assert os.environ[VARIABLE] == "false"
    assert thread_count() == cores  # it was this package that said so
    monkeypatch.setattr("titan_data.threads._set_by", None)
    assert thread_count() == 1
    monkeypatch.setenv(VARIABLE, "true")
    assert thread_count() == cores


@pytest.mark.usefixtures("unset")
def test_one_of_several_processes_has_one_thread(monkeypatch):
    monkeypatch.setenv(VARIABLE, "true")
    one_thread()
    assert thread_count() == 1
    with library_threads():
        assert os.environ[VARIABLE] == "false"
