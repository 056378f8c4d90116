"""Runs lm-eval on an exported Hugging Face folder, and prints its metrics as one line of JSON at the end.

    uv run --with 'lm-eval[hf]' scripts/evaluate.py runs/mine/hugging_face/step-100 --tasks arc_easy,hellaswag

As a part of a run, for each of its exports (a rank's GPU is in use: give the evaluation another one, or the CPU):

    uv run --with 'lm-eval[hf]' titan-train --output runs/mine --export.format huggingface --export.every 1000 \
      --evaluation.command 'python scripts/evaluate.py {export} --tasks arc_easy --device cpu --limit 200'
"""

import argparse
import json
import math

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    """Evaluates what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder that transformers loads")
    parser.add_argument("--tasks", required=True, help="names of lm-eval's tasks, with commas between them")
    parser.add_argument("--include-path", help="folder with the YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, help="documents of each task; default: all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default=None, help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="of the weights while they are evaluated")
    chosen = parser.parse_args()
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": chosen.export, "dtype": chosen.dtype},
        tasks=chosen.tasks.split(","),
        limit=chosen.limit,
        batch_size=chosen.batch_size,
        device=chosen.device,
        task_manager=TaskManager(include_path=chosen.include_path),
    )
    numbers = {
        f"{task}.{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, float) and math.isfinite(value)
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
