import json
import re
import shlex
from pathlib import Path

import pytest

from titan_train.config_file import to_json
from titan_train.configs.llama3 import llama3_debug
from titan_train.plan_cli import run

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize(("arguments", "shown"), re.findall(r"```text\n\$ titan-plan (.*)\n((?:.*\n)*?)```", README))
def test_the_readme_shows_what_is_printed(arguments, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(shlex.split(arguments)) == 0
    assert capsys.readouterr().out == shown


def answer(capsys, *arguments):
    code = run(arguments)
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_plan_lists_categories_modes_and_assumptions(capsys):
    code, out, err = answer(capsys, "--world-size", "8", "--parallel.tp", "2")
    assert (code, err) == (0, "")
    assert out.startswith("llama3_debug on 8 ranks: dp_shard 4 x tp 2; ")
    for word in ("parameters", "gradients", "optimizer", "activations", "communication", "fragmentation", "total"):
        assert f"\n  {word} " in out
    assert "5% of it: assumed, not measured" in out
    assert [line.split("  ")[1] for line in out.splitlines() if "in total" in line] == [
        "none",
        "selective",
        "full, every 2",
        "full",
    ]
    assert out.count("assumed: ") >= 4


def test_a_plan_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = answer(capsys, "--world-size", "8", "--parallel.pp", "2", "--training.global-batch-size", "64")
    assert max(map(len, out.splitlines())) <= 80
    assert "Pipeline rank" in out


def test_the_configuration_of_a_run_is_planned_too(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(llama3_debug()))
    _, by_name, _ = answer(capsys, "--world-size", "2", "--json")
    code, by_file, _ = answer(capsys, "--config", str(path), "--world-size", "2", "--json")
    assert (code, by_file) == (0, by_name)


def test_a_run_directory_is_told_from_its_configuration(capsys, tmp_path):
    (tmp_path / "config.json").write_text(to_json(llama3_debug()))
    code, _, err = answer(capsys, "--config", str(tmp_path), "--world-size", "2")
    assert code == 2
    assert f"give its {tmp_path}/config.json" in err
    assert "--output" not in err


def test_one_of_a_kind_is_not_called_many(capsys):
    one = ["--world-size", "1", "--training.global-batch-size", "1", "--training.micro-batch-size", "1"]
    _, out, _ = answer(capsys, *one)
    assert "on 1 rank: one device; 1 micro-batch of 1 x " in " ".join(out.split())
    _, out, _ = answer(capsys, *one, "--fit", "80")
    assert out.startswith("1 layout of llama3_debug fits into 80 GB")


def test_json_has_all_in_bytes(capsys):
    code, out, _ = answer(capsys, "--world-size", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert sum(found["bytes"].values()) == found["peak_bytes"] == found["by_pipeline_rank"][0]
    assert found["total_bytes"] == found["peak_bytes"] + found["fragmentation_bytes"]
    assert set(found["by_remat"]) == {"none", "selective", "full, every 2", "full"}


def test_layouts_that_fit_are_listed_with_their_order(capsys):
    code, out, _ = answer(capsys, "--world-size", "8", "--fit", "80", "--training.global-batch-size", "64")
    assert code == 0
    lines = out.splitlines()
    assert "least communication first: small tp, then small pp" in " ".join(out.split())
    assert next(line for line in lines if line.startswith("  dp_shard 8 ")).split()[2] == "none"
    code, out, _ = answer(capsys, "--world-size", "8", "--fit", "80", "--json", "--training.global-batch-size", "64")
    found = json.loads(out)
    assert (code, found["memory_bytes"]) == (0, 80_000_000_000)
    assert all(layout["headroom_bytes"] > 0 for layout in found["fitting"])


def test_it_says_what_is_short_if_nothing_fits(capsys):
    code, out, _ = answer(capsys, "--world-size", "8", "--fit", "0.001")
    text = " ".join(out.split())
    assert code == 1
    assert text.startswith("None of the ")
    assert "are short; most of it are" in text
    assert run(["--world-size", "8", "--fit", "0.001", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["smallest"]["headroom_bytes"] < 0


WRONG = {
    "no world size": ([], "titan-plan needs --world-size"),
    "no ranks": (["--world-size", "0"], "--world-size is 0; it must be at least 1"),
    "unknown configuration": (["--world-size", "8", "--config", "llama3_9b"], "llama3_9b"),
    "indivisible": (["--world-size", "7", "--parallel.tp", "2"], "parallel.tp 2 does not divide the 7 ranks"),
    "no memory": (["--world-size", "8", "--fit", "0"], "--fit is 0; give the memory of one GPU in GB"),
    "a flag misspelt": (["--wrld-size", "8"], "There is no --wrld-size. Did you mean --world-size?"),
    "a flag misspelt with its value": (["--world-size=8", "--ft=80"], "There is no --ft. Did you mean --fit?"),
    "negative": (["--world-size", "8", "--fit", "-1"], "--fit is -1"),
    "not a number": (["--world-size", "8", "--fit", "nan"], "--fit is nan"),
    "not modelled": (
        ["--world-size", "8", "--optimizer.name", "muon", "--parallel.cpu-offload"],
        "does not model optimizer muon; parallel.cpu_offload",
    ),
    "split backward": (
        ["--world-size", "2", "--parallel.pp", "2", "--parallel.pp-schedule", "ZBVZeroBubble"],
        "does not model parallel.pp_schedule ZBVZeroBubble",
    ),
    "no layout": (["--world-size", "4096", "--fit", "80"], "No layout of this configuration is valid on 4096 ranks"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_paragraph(name, capsys):
    arguments, message = WRONG[name]
    code, out, err = answer(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("titan-plan: ")
    assert message in err
    assert "Traceback" not in err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["--help"])
    out = capsys.readouterr().out
    for flag in ("--world-size N", "--fit GB", "--json", "--parallel.tp"):
        assert flag in out
