"""`titan-train` as a stranger runs it: real processes, real signals, and errors that say what to do."""

import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import RankFailure, run_ranks
from titan_ckpt.checkpointer import Checkpointer
from titan_train import cli, trainer
from titan_train.config_file import to_json
from titan_train.interrupt import Interrupt
from titan_train.run_directory import RunDirectory
from training_runs import TINY_FLAGS, change, curve, layout, metrics, titan_train, train


def command(*arguments, ranks=1):
    """The real command line, for a process of its own."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "titan_train", *map(str, arguments)]


def launch(*arguments, ranks=1):
    """Starts a new interpreter, or torchrun, and waits for it."""
    return subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, check=False)


def refused(result):
    """The error's text, after checking that it is one paragraph without a traceback."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stderr.startswith("titan-train: ")
    return result.stderr


def test_a_run_without_an_output_names_its_own_directory(corpus, tmp_path):
    flags = [*TINY_FLAGS, "--data.source", corpus, "--training.steps=3"]
    result = titan_train(*flags, setup=lambda: os.chdir(tmp_path))
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"llama3_debug-\d{8}-\d{6}", directory.name)
    hint = re.search(r"Try next: (--config \S+ --training.steps \d+)", result.stdout)
    longer = titan_train(*hint[1].split(), setup=lambda: os.chdir(tmp_path))
    assert "Resumed from" in longer.stdout, longer.stderr
    assert "tok/s" in result.stdout
    assert "eta" in result.stdout
    assert (directory / "checkpoints" / "step-3" / "files" / "tokenizer.json").exists()
    assert json.loads((directory / "checkpoints" / "step-3" / "files" / "model.json").read_text())["dim"] == 32


def test_torchrun_shares_the_work_and_a_finished_run_says_so(corpus, tmp_path):
    flags = [
        *TINY_FLAGS,
        "--data.source",
        corpus,
        "--training.steps=4",
        "--metrics.log-every=1",
        "--metrics.no-console",
    ]
    shared = launch(*flags, "--parallel.dp-shard=2", "--output", tmp_path / "two", ranks=2)
    assert shared.returncode == 0, shared.stderr
    alone = titan_train(*flags, "--output", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    assert curve(metrics(tmp_path / "two")) == pytest.approx(curve(metrics(tmp_path / "one")), rel=1e-5)
    again = titan_train(*flags, "--output", tmp_path / "one")
    assert again.returncode == 0
    assert "This run is finished" in again.stdout


def test_a_run_starts_again_from_its_own_config_json(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 3}), tmp_path / "first")
    result = titan_train("--config", tmp_path / "first" / "config.json", "--training.steps=5")
    assert result.returncode == 0, result.stderr
    assert "after step 3" in result.stdout
    assert len(curve(metrics(tmp_path / "first"))) == 5
    anew = titan_train("--config", tmp_path / "first" / "config.json", "--output", tmp_path / "second")
    assert anew.returncode == 0, anew.stderr
    assert curve(metrics(tmp_path / "second")) == curve(metrics(tmp_path / "first"))


def test_raising_the_steps_keeps_the_end_of_the_decay(tiny, tmp_path):
    config = change(tiny, **{"schedule.total_steps": None, "training.steps": 4, "output": str(tmp_path / "run")})
    path = tmp_path / "start.json"
    path.write_text(to_json(config))
    for steps in (4, 6):
        result = titan_train("--config", path, "--training.steps", steps)
        assert result.returncode == 0, result.stderr
    assert curve(metrics(tmp_path / "run"), "lr")[3:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("number", "ranks", "code"),
    [
        (signal.SIGINT, 1, 130),
        (signal.SIGTERM, 1, 75),
        pytest.param(signal.SIGUSR1, 1, 75, marks=pytest.mark.slow),
        # torchrun ends itself with 1, since it received the signal too
        pytest.param(signal.SIGTERM, 2, None, marks=pytest.mark.slow),
        (signal.SIGUSR1, 2, 0),
    ],
)
def test_a_signal_saves_and_ends_and_the_run_goes_on(corpus, tmp_path, start, number, ranks, code):
    run = tmp_path / "run"
    flags = [*TINY_FLAGS, "--data.source", corpus, "--training.steps=100000", "--output", run]
    flags += ["--metrics.log-every=1", "--metrics.no-console", "--checkpoint.every=0"]
    process = start(*flags, ranks=ranks)
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    assert status(run)["status"] == "running"
    if (number, ranks) == (signal.SIGUSR1, 2):
        os.kill(workers(process.pid)[-1], number)  # one of the ranks only
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert "Interrupted after step" in out, err
    assert process.returncode == code or code is None
    done = len(curve(metrics(run)))
    by = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    assert (status(run)["status"], status(run)["step"], status(run)["signal"]) == ("preempted", done, by)
    result = titan_train(*flags[:-1], f"--training.steps={done + 2}", "--schedule.total-steps=100000")
    assert result.returncode == 0, result.stderr
    assert f"after step {done}." in result.stdout
    assert len(curve(metrics(run))) == done + 2
    assert (status(run)["status"], status(run)["step"]) == ("finished", done + 2)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_while_a_run_starts_ends_it_before_its_first_step(corpus, tmp_path, start, ranks):
    run = tmp_path / "run"
    flags = [*TINY_FLAGS, "--data.source", corpus, "--training.steps=100000", "--output", run, "--metrics.log-every=1"]
    process = start(*flags, ranks=ranks)
    wait_for(lambda: (run / "status.json").exists())
    for worker in workers(process.pid) if ranks > 1 else [process.pid]:
        os.kill(worker, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (75 if ranks == 1 else 0), err
    assert status(run)["status"] == "preempted"
    assert not (run / "checkpoints").exists()


def status(run):
    return json.loads((run / "status.json").read_text())


def workers(torchrun):
    """The processes that torchrun has started."""
    found = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return [int(child) for child in found if "titan_train" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.fixture
def start():
    """Starts the command, on ranks or alone, and leaves none of its processes behind."""
    started = []

    def begin(*flags, ranks=1):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command(*flags, ranks=ranks), **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            for worker in workers(process.pid):
                os.kill(worker, signal.SIGKILL)
            process.kill()
        process.communicate()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.source", "/nowhere/text"], "/nowhere/text"),
        (["--data.source", "{empty}"], "empty"),
        (["--data.tokenizer", "{broken}", "--data.vocab-size=4096"], "broken.json"),
        (["--data.vocab-size=400"], "set --model.vocab-size 400 or more"),
        (["--output", "{broken}/run"], "Cannot write to the run directory"),
        (["--checkpoint.resume", "required"], "There is no whole checkpoint"),
        (["--quant.recipe", "mxfp8"], "needs an NVIDIA GPU of compute capability 10.0"),
        (["--metrics.wandb", "--metrics.wandb-project="], "metrics.wandb_project is empty"),
    ],
)
def test_bad_input_is_one_clear_paragraph(corpus, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken.json"}
    given = [argument.format(**places) for argument in arguments]
    flags = [*TINY_FLAGS, "--data.source", corpus, "--training.steps=1", "--output", tmp_path / "run"]
    result = titan_train(*flags, *given)
    assert message in refused(result)


def test_parameter_groups_from_a_file_of_ones_own_are_kept_with_the_run(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from titan_core.config import OptimizerConfig, ParamGroupConfig\n"
        "from titan_train.config_file import read_config\n"
        "from pathlib import Path\n"
        "def slow_embedding():\n"
        "    groups = (ParamGroupConfig(roles=('embedding',), lr_factor=0.1),)\n"
        "    base = read_config(Path(__file__).with_name('base.json'))\n"
        "    return dataclasses.replace(base, optimizer=OptimizerConfig(name='muon', groups=groups))\n"
    )
    (tmp_path / "base.json").write_text(to_json(change(tiny, **{"training.steps": 1})))
    chosen = ["--module", tmp_path / "mine.py", "--config", "slow_embedding", "--output", tmp_path / "run"]
    assert titan_train(*chosen).returncode == 0
    again = titan_train("--config", tmp_path / "run" / "config.json", "--training.steps=2")
    assert again.returncode == 0, again.stderr
    assert "Resumed from" in again.stdout
    wrong = titan_train("--config", tmp_path / "run" / "config.json", "--optimizer.groups.0.roles", "embed")
    assert "'embed'" in refused(wrong)


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    def hide():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    result = titan_train(*TINY_FLAGS, "--device=cuda", "--output", tmp_path / "run", setup=hide)
    assert "PyTorch sees no GPU here" in refused(result)


def test_what_only_a_gpu_can_do_is_refused_once_it_is_known_that_there_is_none(tiny, tmp_path):
    config = change(tiny, device="auto", output=str(tmp_path / "run"), **layout(cpu_offload=True))
    with pytest.raises(RankFailure, match=r"ConfigError: .*\n.*parallel\.cpu_offload has no effect on a CPU"):
        run_ranks(2, trainer.train, config, Interrupt(alone=False), name="test")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.tp=2"], "parallel.tp 2 does not divide model.kv_heads 3"),
        (["--parallel.pp=2"], "The pipeline has 2 stages, but the model only 1 layers"),
        (["--parallel.cp=2", "--training.seq-len=30"], "which does not divide training.seq_len 30"),
        (["--parallel.ep=2"], "this model has no experts"),
        (["--parallel.pp-schedule=GPipe"], "parallel.pp_schedule is set, but there is no pipeline"),
        (["--remat.mode=budget"], "add --compile.enabled"),
        (["--parallel.tp=3"], "does not divide the 2 ranks"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_anything_starts(tmp_path, flags, message):
    def two_ranks():
        os.environ["WORLD_SIZE"] = "2"

    shape = ["--model.heads=6", "--model.kv-heads=3", "--output", tmp_path / "run"]
    result = titan_train(*TINY_FLAGS, *shape, *flags, setup=two_ranks)
    assert result.returncode == 2
    assert message in refused(result)
    assert not (tmp_path / "run").exists()


def test_a_grouped_product_that_torch_does_not_have_is_refused(tmp_path):
    mixture = ["--module", "qwen3", "--config", "qwen3_debug_moe", "--model.moe.grouped-mm", "grouped"]
    result = titan_train(*mixture, "--precision.master-dtype", "float64", "--output", tmp_path / "run")
    assert "model.moe.grouped_mm grouped takes no float64" in refused(result)


def test_an_unknown_compiler_is_refused(corpus, tmp_path):
    flags = [*TINY_FLAGS, "--data.source", corpus, "--output", tmp_path / "run"]
    result = titan_train(*flags, "--compile.enabled", "--compile.backend", "inductr")
    assert re.search(r"compile\.backend 'inductr' is unknown to this torch; use one of .*inductor", refused(result))


@pytest.mark.parametrize("flag", ["--parallel.no-such=1", "--explain --compile.enabled --compile.backend=foo"])
def test_a_wrong_command_line_is_said_once(flag):
    first, second = (
        titan_train(*TINY_FLAGS, *flag.split(), setup=functools.partial(os.environ.update, RANK=rank, WORLD_SIZE="2"))
        for rank in ("0", "1")
    )
    assert (first.returncode, second.returncode) == (2, 2)
    assert ("no-such" if "no-such" in flag else "compile.backend 'foo' is unknown") in first.stderr
    assert second.stderr == ""


def test_what_all_ranks_refuse_alike_is_said_once(tiny, tmp_path):
    config = change(tiny, **layout(pp=2, pp_split=("layers.7",)), **{"training.micro_batch_size": 1})
    (tmp_path / "config.json").write_text(to_json(config))
    (first, said), (second, unsaid) = on_two_ranks(
        tmp_path, "--config", tmp_path / "config.json", "--output", tmp_path / "run"
    )
    assert (first, second) == (1, 1)
    assert "parallel.pp_split names 'layers.7', which is no block of this model" in said
    assert unsaid == ""


def on_two_ranks(folder, *arguments):
    """Runs the command on two forked ranks of one group: the exit code of each, and what it has said."""

    def run():
        said = folder / f"said-{os.environ['RANK']}"
        with said.open("w") as file, contextlib.redirect_stderr(file):
            code = cli.run([str(argument) for argument in arguments])
        return code, said.read_text()

    return run_ranks(2, run)


def test_a_directory_of_another_experiment_is_refused_unless_told_otherwise(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    flags = ["--config", tmp_path / "run" / "config.json", "--training.steps=3", "--optimizer.lr=0.5"]
    error = refused(titan_train(*flags))
    assert "belongs to another experiment" in error
    assert "optimizer.lr: 0.001 -> 0.5" in error
    assert curve(metrics(tmp_path / "run"), "lr")[0] != 0.5
    result = titan_train(*flags, "--checkpoint.allow-changes")
    assert result.returncode == 0, result.stderr
    assert len(curve(metrics(tmp_path / "run"))) == 3


def test_never_does_not_go_on_from_a_checkpoint(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    error = refused(titan_train("--config", tmp_path / "run" / "config.json", "--checkpoint.resume=never"))
    assert "holds a checkpoint of step 2" in error


def test_a_truncated_newest_checkpoint_is_passed_over_loudly(tiny, tmp_path):
    config = change(tiny, **{"training.steps": 4, "checkpoint.every": 2})
    whole = curve(train(config, tmp_path / "run"))
    (data,) = (tmp_path / "run" / "checkpoints" / "step-4").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    result = titan_train("--config", tmp_path / "run" / "config.json")
    assert result.returncode == 0, result.stderr
    assert "step-4" in result.stdout
    assert data.name in result.stdout
    assert "after step 2." in result.stdout
    assert curve(metrics(tmp_path / "run")) == whole


def test_no_whole_checkpoint_where_one_is_required(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    error = refused(titan_train("--config", tmp_path / "run" / "config.json", "--checkpoint.resume=required"))
    assert "None of the checkpoints" in error


def test_a_second_writer_is_refused(tiny, tmp_path, start):
    config = change(tiny, **{"training.steps": 10**6, "schedule.total_steps": 10**6, "output": str(tmp_path / "run")})
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    first = start("--config", path)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    assert f"in use by another titan-train (process {first.pid}" in refused(titan_train("--config", path))
    first.kill()
    first.wait()


def test_one_directory_of_checkpoints_takes_one_run_at_a_time(tiny, tmp_path):
    config = change(tiny, output=str(tmp_path / "a"), **{"checkpoint.directory": str(tmp_path / "shared")})
    (tmp_path / "config.json").write_text(to_json(config))
    holder = RunDirectory(tmp_path / "shared")
    holder.claim()
    assert "is in use by another titan-train" in refused(titan_train("--config", tmp_path / "config.json"))
    holder.release()
    result = titan_train("--config", tmp_path / "config.json")
    assert f"weights in {tmp_path / 'shared'}" in result.stdout, result.stderr


def test_a_reader_may_leave_early():
    piped = f"{sys.executable} -m titan_train --help | head -1"
    result = subprocess.run(piped, shell=True, capture_output=True, text=True, check=True)
    assert (result.stderr, len(result.stdout.splitlines())) == ("", 1)
    closed = f"exec {sys.executable} -m titan_train --help"
    with subprocess.Popen(closed, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_full_disk_while_saving_loses_nothing(tiny, tmp_path):
    """A limit on the size of a file stands for a full disk: both fail in the middle of a write."""
    config = change(tiny, **{"training.steps": 2})
    train(config, tmp_path / "run")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ["--config", tmp_path / "run" / "config.json", "--training.steps=3"]
    result = titan_train(*arguments, setup=limit)
    error = refused(result)
    assert "step 3 could not be saved" in error.lower()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert titan_train(*arguments).returncode == 0


def test_one_rank_that_fails_names_itself(tiny, tmp_path):
    """Rank 0 cannot claim its directory; the other rank stops with it and adds no second message."""
    (tmp_path / "file").write_text("")
    config = change(tiny, output=str(tmp_path / "file" / "run"), **layout(dp_shard=2))
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    (first, said), (second, unsaid) = on_two_ranks(tmp_path, "--config", path)
    assert (first, second) == (1, 1)
    assert said.startswith("titan-train (rank 0): Cannot write to the run directory")
    assert unsaid == ""


def test_checkpoints_can_be_switched_off(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2, "checkpoint.enabled": False}), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert len(metrics(tmp_path)) == 2


def test_deterministic_kernels_give_the_same_run(tiny, tmp_path):
    plain = train(change(tiny, **{"training.steps": 2}), tmp_path / "plain")
    strict = train(change(tiny, **{"training.steps": 2, "parallel.deterministic": True}), tmp_path / "strict")
    assert curve(strict) == curve(plain)


@pytest.mark.slow
def test_other_sinks_get_the_metrics_and_a_tracked_run_continues(corpus, tmp_path):
    flags = [*TINY_FLAGS, "--data.source", corpus, "--output", tmp_path, "--metrics.log-every=1"]
    flags += ["--metrics.tensorboard", "--metrics.wandb", "--metrics.wandb-mode=offline", "--schedule.total-steps=4"]
    for steps in (2, 4):
        result = launch(*flags, f"--training.steps={steps}")
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    tracked = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(tracked) == 1  # both parts have the same run id


def test_a_run_that_diverges_stops_before_it_replaces_a_good_checkpoint(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    flags = ["--config", tmp_path / "run" / "config.json", "--training.steps=6", "--optimizer.lr=1e6"]
    flags += ["--checkpoint.allow-changes", "--optimizer.weight-decay=1000"]
    result = titan_train(*flags)
    assert "The run has diverged and stops without saving" in refused(result)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


def test_a_closed_or_full_standard_output_does_not_stop_training(tiny, tmp_path):
    config = change(tiny, **{"training.steps": 2, "metrics.console": True})
    path = tmp_path / "config.json"
    path.write_text(to_json(config))

    def close():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    def fill():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    for name, setup in {"closed": close, "full": fill}.items():
        result = titan_train("--config", path, "--output", tmp_path / name, setup=setup)
        assert result.returncode == 0, result.stderr
        assert len(metrics(tmp_path / name)) == 2


def test_damaged_checkpoints_are_not_replaced_by_a_new_start(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    (data,) = (tmp_path / "run" / "checkpoints" / "step-2").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    error = refused(titan_train("--config", tmp_path / "run" / "config.json", "--training.steps=3"))
    assert "None of the checkpoints in" in error
    assert data.exists()


def test_a_lost_config_json_is_found_in_the_checkpoint(tiny, tmp_path):
    config = change(tiny, **{"training.steps": 2, "output": str(tmp_path / "run")})
    path = tmp_path / "start.json"
    path.write_text(to_json(change(config, **{"schedule.total_steps": None})))
    assert titan_train("--config", path).returncode == 0
    (tmp_path / "run" / "config.json").unlink()
    result = titan_train("--config", path, "--training.steps=3")
    assert result.returncode == 0, result.stderr
    assert len(curve(metrics(tmp_path / "run"))) == 3


def test_a_file_of_the_run_that_is_a_folder_costs_a_warning(tiny, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    path = tmp_path / "config.json"
    path.write_text(to_json(change(tiny, output=str(tmp_path / "run"), **{"training.steps": 2})))
    result = titan_train("--config", path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-2").exists()


def test_a_checkpoint_that_no_run_wrote_is_refused(tiny, tmp_path):
    config = change(tiny, **{"training.steps": 2, "output": str(tmp_path / "run")})
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    Checkpointer(tmp_path / "run" / "checkpoints").save(1, {})
    assert "was not written by titan-train" in refused(titan_train("--config", path))
