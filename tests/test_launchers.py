"""The launchers really launch: two nodes on this machine, with stand-ins for what brings a command to another one."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from titan_train.cli import run as titan_train
from training_runs import TINY_FLAGS, metrics

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

FLAGS = [*TINY_FLAGS, "--metrics.log-every=1", "--schedule.total-steps=100000"]

# An SSH that stays here, and a Slurm whose two nodes are this machine. What `srun` is sent, all processes of its tasks
# are sent, as in Slurm.
STAND_INS = {
    "ssh": """#!/usr/bin/env bash
while [ "$1" = -o ]; do shift 2; done
echo "$1" >> "$TOLD/hosts"
[ "$1" != late ] || sleep 3
echo $$ > "$TOLD/$1.pid"
exec bash -c "$2"
""",
    "scontrol": """#!/usr/bin/env bash
case $1 in
  show) echo localhost; echo localhost ;;
  requeue) echo "$2" >> "$TOLD/requeued" ;;
esac
""",
    "srun": f"""#!{sys.executable}
import itertools, os, signal, subprocess, sys

def send(number, frame):
    parents = [line.split() for line in subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines()]
    family = [str(task.pid) for task in tasks]
    for pid in family:
        family += [child for child, parent in parents if parent == pid]
    for pid in family:
        subprocess.run(["kill", f"-{{number}}", pid], stderr=subprocess.DEVNULL)

command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGUSR1, send)
sys.exit(max(task.wait() for task in tasks))
""",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost[1-2]", "SLURM_NNODES": "2"}

# A torchrun that does what a test says, and writes down what it was told.
TORCHRUN = """#!/usr/bin/env bash
trap 'eval "$WHEN_TOLD"; exit 1' TERM
printf '%s\\n' "$@" > "$TOLD/arguments"
eval "$DOES"
"""


@pytest.fixture
def place(tmp_path):
    """A copy of the repository's scripts, beside the stand-ins."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, text in STAND_INS.items():
        install(tmp_path, name, text)
    return tmp_path


def install(place, name, text):
    path = place / "tools" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def settings(place, **more):
    """The environment in which a launcher finds the stand-ins, and this Python."""
    path = f"{place / 'tools'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "NPROC": "1", "PORT": str(free_port()), "TOLD": str(place)} | more


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(place, corpus):
    """Starts a launcher, whose other arguments train a tiny model; ends what is left of it at the end."""
    started = []

    def begin(*command, steps, **environment):
        flags = [*FLAGS, "--data.source", str(corpus), f"--training.steps={steps}"]
        with (place / "log").open("w") as log:
            process = subprocess.Popen(
                [*map(str, command), *flags],
                cwd=place,
                env=settings(place, **environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def status(place):
    return json.loads((place / "run" / "status.json").read_text())["status"]


def wait_for_steps(place, count):
    log = place / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, (place / "log").read_text()
        time.sleep(0.05)


def ended(process, place):
    """The exit code; shows what was said if it is none that a launcher should give."""
    code = process.wait(120)
    assert code in (0, 75), (place / "log").read_text()
    return code


def test_ssh_trains_on_all_hosts_and_ends_when_told(place, start):
    (place / "hosts.txt").write_text("# two of them\nlocalhost\n\nsomebody@localhost\n")
    process = start("scripts/ssh.sh", "hosts.txt", "run", steps=100_000)
    wait_for_steps(place, 3)
    process.send_signal(signal.SIGTERM)
    assert ended(process, place) == 75
    assert status(place) == "preempted"
    assert "layout 2 ranks" in (place / "log").read_text()
    assert sorted((place / "hosts").read_text().split()) == ["localhost", "somebody@localhost"]


@pytest.mark.slow
def test_ssh_leaves_no_processes_behind_when_it_is_killed(place, start):
    (place / "hosts.txt").write_text("localhost\nlocalhost\n")
    process = start("scripts/ssh.sh", "hosts.txt", "run", steps=100_000)
    wait_for_steps(place, 3)
    process.kill()
    deadline = time.monotonic() + 60
    while status(place) != "preempted":
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_ssh_goes_on_with_the_hosts_that_are_left(place, start):
    (place / "hosts.txt").write_text("localhost\nlate\n")  # the nodes meet on the first
    process = start("scripts/ssh.sh", "hosts.txt", "run", "--checkpoint.every=5", steps=100_000, MIN_NODES="1")
    wait_for_text(place, "layout 2 ranks")
    wait_for_steps(place, 12)
    for pid in family(int((place / "late.pid").read_text())):
        os.kill(pid, signal.SIGKILL)
    wait_for_text(place, "Resumed from")
    log = (place / "log").read_text()
    assert "layout one process" in log
    before = int(re.search(r"after step (\d+)", log)[1])
    assert before >= 5
    wait_for_steps(place, before + 3)
    process.send_signal(signal.SIGTERM)
    assert ended(process, place) == 75
    assert status(place) == "preempted"
    steps = [line["step"] for line in metrics(place / "run")]
    assert steps == list(range(1, len(steps) + 1))


def wait_for_text(place, text):
    deadline = time.monotonic() + 120
    while text not in (place / "log").read_text():
        assert time.monotonic() < deadline, (place / "log").read_text()
        time.sleep(0.1)


def family(pid):
    """A process and all that it has started."""
    listed = subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines()
    parents = [tuple(map(int, line.split())) for line in listed]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents if its_parent == parent]
    return found


@pytest.mark.parametrize("nodes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_slurm_queues_a_preempted_run_again_and_not_a_finished_one(place, start, nodes):
    job = SLURM | {"SLURM_NNODES": nodes}
    process = start("bash", "scripts/slurm.sh", "run", steps=100_000, **job)
    wait_for_steps(place, 3)
    process.send_signal(signal.SIGUSR1)
    assert ended(process, place) == 0, "what requeues is scontrol"
    assert status(place) == "preempted"
    assert (place / "requeued").read_text() == "7\n"
    (place / "requeued").unlink()
    done = len(metrics(place / "run"))
    again = start("bash", "scripts/slurm.sh", "run", steps=done + 2, SLURM_RESTART_COUNT="1", **job)
    assert ended(again, place) == 0
    assert status(place) == "finished"
    assert f"after step {done}." in (place / "log").read_text()
    assert len(metrics(place / "run")) == done + 2
    assert not (place / "requeued").exists()


@pytest.mark.slow
def test_slurm_does_not_queue_again_what_a_user_has_ended(place, start):
    process = start("bash", "scripts/slurm.sh", "run", steps=100_000, **SLURM)
    wait_for_steps(place, 3)
    process.send_signal(signal.SIGTERM)
    assert ended(process, place) == 75
    assert status(place) == "preempted"
    assert not (place / "requeued").exists()


def node(place, does, *, when_told="", send=None, **environment):
    """Runs node.sh with the stand-in torchrun, and returns its exit code."""
    install(place, "python", TORCHRUN)
    (place / "run").mkdir(exist_ok=True)
    process = subprocess.Popen(
        ["scripts/node.sh", "run", "--config", "llama3_debug"],
        cwd=place,
        env=settings(place, NNODES="1:2", ENDPOINT="a:1", DOES=does, WHEN_TOLD=when_told, **environment),
        stdin=subprocess.PIPE if "END_WITH_STDIN" in environment else None,
    )
    if send is not None:
        while not (place / "ready").exists():
            time.sleep(0.01)
        send(process)
    return process.wait(30)


def says(word):
    return f"""echo '{{"status": "{word}", "time": "'$RANDOM$RANDOM'"}}' > run/status.json; """


WAITS = "touch ready; for i in {1..200}; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("does", "code"),
    [
        (says("finished"), 0),
        (says("preempted"), 75),  # a signal came to another node
        (says("failed") + "exit 1", 1),
        (says("running") + "exit 1", 1),
        (says("running"), 0),  # the run directory is not shared: torchrun knows best
        ("exit 2", 2),
    ],
)
def test_a_node_ends_as_the_run_says(place, does, code):
    assert node(place, does) == code


def test_what_an_earlier_start_said_does_not_count(place):
    assert node(place, says("preempted")) == 75
    assert node(place, "exit 1") == 1, "or a launcher would start it again and again"


def test_a_node_has_as_many_processes_as_gpus_and_one_without_a_gpu(place):
    asks = f'[ "$1" != -c ] || exec {sys.executable} "$@"'
    for gpus, processes in ((0, "1"), (4, "4")):
        (place / "torch.py").write_text(f"class cuda: device_count = staticmethod(lambda: {gpus})")
        assert node(place, asks, NPROC="", PYTHONPATH=str(place), PYTHONDONTWRITEBYTECODE="1") == 0
        arguments = (place / "arguments").read_text().splitlines()
        assert arguments[arguments.index("--nproc-per-node") + 1] == processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_passed_on_once(place, number):
    def send_twice(process):
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)

    told = "echo told >> told; sleep 0.5; " + says("preempted")
    assert node(place, WAITS, when_told=told, send=send_twice) == 75
    assert (place / "told").read_text() == "told\n"


def test_a_node_that_was_told_to_end_wants_to_be_started_again_whatever_it_had_time_to_say(place):
    assert node(place, WAITS, send=lambda process: process.terminate()) == 75


def test_where_signals_reach_all_none_is_passed_on(place):
    def send(process):
        process.terminate()
        time.sleep(0.3)
        (place / "go").touch()

    does = "touch ready; until [ -e go ]; do sleep 0.05; done; " + says("preempted")
    assert node(place, does, when_told="touch told", send=send, SIGNALS_REACH_ALL="1") == 75
    assert not (place / "told").exists()


def test_the_end_of_standard_input_is_a_signal(place):
    def send(process):
        process.stdin.close()

    assert node(place, WAITS, when_told=says("preempted"), send=send, END_WITH_STDIN="1") == 75


def understood(place, *, nodes):
    """What torchrun was told, after checking that it and titan-train would understand it."""
    options = get_args_parser().parse_args((place / "arguments").read_text().splitlines()[2:])
    assert options.nnodes == nodes
    assert options.max_restarts == 3
    assert options.shutdown_timeout == 600
    assert "SIGUSR1" in options.signals_to_handle
    assert (options.module, options.training_script) == (True, "titan_train")
    return options


def test_nodes_are_elastic(place):
    assert node(place, says("finished")) == 0
    options = understood(place, nodes="1:2")
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "a:1")


def test_the_job_on_kubernetes_starts_what_torchrun_understands(place, monkeypatch, capsys):
    job = yaml.safe_load((SCRIPTS / "kubernetes.yaml").read_text())
    template = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    arguments = [argument.replace("/runs", "run") for argument in container["args"]]
    install(place, "python", TORCHRUN)
    subprocess.run(
        [*container["command"], *arguments], cwd=place, env=settings(place, DOES=":", **variables), check=True
    )
    options = understood(place, nodes="2:2")
    assert options.rdzv_endpoint == f"{job['metadata']['name']}-nodes-0-0.{job['spec']['network']['subdomain']}:29500"
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > options.shutdown_timeout
    assert template["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    monkeypatch.chdir(place)
    assert titan_train([*options.training_script_args, "--print-config"]) == 0
    capsys.readouterr()


def test_the_job_of_skypilot_starts_what_torchrun_understands(place, monkeypatch, capsys):
    job = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    install(place, "python", TORCHRUN)
    variables = job["envs"] | {
        "RUN": "8b",
        "FLAGS": "--config llama3_8b --data.source 'my texts/'",
        "SKYPILOT_NUM_NODES": str(job["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "titan-1",
    }
    subprocess.run(["bash", "-c", job["run"]], cwd=place, env=settings(place, DOES=":", **variables), check=True)
    options = understood(place, nodes="2")
    assert (options.rdzv_endpoint, options.nproc_per_node) == ("10.0.0.1:29500", "8")
    monkeypatch.chdir(place)
    assert titan_train([*options.training_script_args, "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"]["source"] == "my texts/"
    assert printed["checkpoint"]["directory"] == "s3://my-titan-bucket/checkpoints/8b"


def test_a_launcher_without_what_it_needs_says_so(place):
    for command in (["scripts/node.sh"], ["scripts/ssh.sh"]):
        result = subprocess.run(command, cwd=place, env=settings(place), capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "is missing" in result.stderr


def commands(name):
    """The commands in the header of a launcher, and what is said of it in the README, as they would be typed."""
    header = re.match(r"(?:#.*\n)+", (SCRIPTS / name).read_text())[0]
    lines = [line.strip("# ") for line in re.sub(r"\\\n#", " ", header).splitlines()]
    lines += re.findall(r"`([^`]*)`", (ROOT / "apps" / "train" / "README.md").read_text())
    return [line for line in lines if f"scripts/{name} " in line]


@pytest.mark.parametrize("name", ["run_train.sh", "node.sh", "slurm.sh", "ssh.sh"])
def test_the_commands_in_the_header_and_the_readme_are_understood(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = commands(name)
    assert found
    for command in found:
        words = shlex.split(command.replace(" …", ""))
        words = words[words.index(f"scripts/{name}") + 1 :]
        flags = words[next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) :]
        assert titan_train([*flags, "--print-config"]) == 0, capsys.readouterr().err
