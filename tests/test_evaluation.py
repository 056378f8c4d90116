"""What a run exports is judged while it trains: by any command, and by lm-eval."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from titan_train.config_file import to_json
from titan_train.evaluation import EvaluationError, last_numbers
from training_runs import change, curve, metrics, titan_train, train

ROOT = Path(__file__).parents[1]


def exporting(config, command, **changes):
    changes = {"training.steps": 6, "export.every": 2, **changes}
    return change(config, **{"export.format": "huggingface", "evaluation.command": command, **changes})


def python(code):
    return shlex.join([sys.executable, "-c", code, "{export}", "{step}"])


SIZE = """
import json, pathlib, os, sys
assert "RANK" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
print("looking at", sys.argv[1])
size = sum(path.stat().st_size for path in pathlib.Path(sys.argv[1]).iterdir())
print(json.dumps({"bytes": size, "number": int(sys.argv[2])}))
"""


def results(run):
    return [json.loads(line) for line in (run / "evaluation" / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_export_is_judged_once_and_in_order(tiny, tmp_path, world_size):
    lines = train(exporting(tiny, python(SIZE)), tmp_path, world_size)
    found = results(tmp_path)
    assert [line["step"] for line in found] == [line["number"] for line in found] == [2, 4, 6]
    for line in found:
        folder = tmp_path / "hugging_face" / f"step-{line['step']}"
        assert line["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert curve(lines) == curve(metrics(tmp_path))


def test_what_it_finds_is_logged_with_a_later_step(tiny, tmp_path):
    code = """print('{"score": 0.5}')"""
    lines = train(exporting(tiny, python(code), **{"training.steps": 400, "export.every": 200}), tmp_path)
    (line,) = [line for line in lines if "evaluation.score" in line]
    assert (line["evaluation.score"], line["evaluation.step"]) == (0.5, 200)
    assert line["step"] > 200


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("print('no numbers')", "no JSON object"),
        ("import time; time.sleep(60)", r"took longer than 0\.2 s"),
    ],
)
def test_a_command_that_fails_stops_nothing(tiny, tmp_path, capfd, code, why):
    lines = train(exporting(tiny, python(code), **{"evaluation.timeout_seconds": 0.2}), tmp_path)
    assert len(curve(lines)) == 6
    said = capfd.readouterr().out
    assert said.count("has failed") == 3
    assert re.search(why, said)


def test_a_command_that_is_not_there_stops_nothing(tiny, tmp_path, capfd):
    assert len(curve(train(exporting(tiny, "/nowhere/judge {export}"), tmp_path))) == 6
    assert "cannot be started" in capfd.readouterr().out


def test_problems_are_said_before_anything_starts(tiny, tmp_path):
    for command, message in (
        ("judge {folder}", "evaluation.command 'judge {folder}' does not say what it judges; put {export}"),
        ("judge {export} '", "cannot be read: No closing quotation"),
    ):
        (tmp_path / "config.json").write_text(to_json(exporting(tiny, command)))
        refused = titan_train("--config", tmp_path / "config.json", "--output", tmp_path / "run")
        assert refused.returncode == 2
        assert message in refused.stderr
    (tmp_path / "config.json").write_text(to_json(change(tiny, **{"evaluation.command": "judge {export}"})))
    refused = titan_train("--config", tmp_path / "config.json", "--output", tmp_path / "run")
    assert "judges exports, and there are none; add --export.format huggingface" in refused.stderr


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"a": "b"}', '{"a": true}', '{"a": NaN}', '{"a": 1}\nbye'])
def test_the_last_line_must_be_numbers(text):
    with pytest.raises(EvaluationError):
        last_numbers(text)


@pytest.mark.slow
def test_lm_eval_scores_an_export_as_the_model_does(tiny, tmp_path):
    """A multiple-choice task of our own, against likelihoods that transformers computes."""
    transformers = pytest.importorskip("transformers")
    documents = [
        {"text": text, "choices": [" aa", " b", " cdef"], "answer": i % 3}
        for i, text in enumerate(["ab ab", "hij cde", "fgh", "dea bca", "jj", "a"])
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choices.yaml").write_text(
        f"""
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "choices.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    script = [sys.executable, ROOT / "scripts" / "evaluate.py", "{export}", "--tasks", "choices", "--device", "cpu"]
    command = shlex.join(map(str, [*script, "--include-path", tmp_path / "tasks", "--dtype", "float32"]))
    changes = {"export.every": 0, "evaluation.timeout_seconds": 300.0, "optimizer.lr": 0.01}
    train(exporting(tiny, command, **changes), tmp_path / "run")
    errors = (tmp_path / "run" / "evaluation" / "step-6.errors.txt").read_text()
    (line,) = results(tmp_path / "run") if (tmp_path / "run" / "evaluation" / "results.jsonl").exists() else [errors]

    folder = tmp_path / "run" / "hugging_face" / "step-6"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    for document in documents:
        likelihoods = []
        for choice in document["choices"]:
            context = tokenizer(document["text"], add_special_tokens=False).input_ids
            whole = tokenizer(document["text"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right += max(range(3), key=likelihoods.__getitem__) == document["answer"]
    assert line["choices.acc"] == pytest.approx(right / len(documents))
    assert math.isfinite(line["seconds"])
