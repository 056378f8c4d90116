"""Proves a conversion in a process of its own: the model in transformers and ours, on a slice, to the same logits.

    python -m titan_convert.check REQUEST.json

transformers builds the model from the folder's own config.json and tensor names; ours comes from the checkpoint and its
model.json. The two share no table and no code of ours: a wrong name, permutation, head count or frequency shows.
A folder in Meta's format has no such counterpart: its weights are run through the formulas of Meta's release, which
`titan_convert.meta_reference` spells out. Prints one JSON object with the bound that was reached, its time and memory.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError

BOUND = 1e-4
"""Largest difference of two logits that passes, as a part of the largest logit, in float32."""

_TOKENS = 64


def prove(kind: str, foreign: str, native: str, *, keys: str, config: str | None, dtype: str | None) -> dict[str, Any]:
    """Runs the comparison in a child process and returns what it measured.

    Args:
        kind: of the foreign folder, `hf` or `llama`.
        foreign: where that is.
        native: the checkpoint.
        keys: who reads the checkpoint.
        config: what says which model it holds, if it doesn't.
        dtype: to which the result has been cast, if it has.

    Raises:
        CheckpointError: if the two differ by more than `BOUND`, or the child could not compare them.
    """
    request = {"kind": kind, "foreign": foreign, "native": native, "keys": keys, "config": config, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "request.json")
        path.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", "titan_convert.check", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if done.returncode != 0 or not done.stdout.strip():
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise CheckpointError(f"The check could not be made: {last}. Without it, convert with --no-check.")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["relative_difference"] <= BOUND:
        raise CheckpointError(
            f"The result computes other logits than the source: they differ by {found['difference']:.3g}, "
            f"{found['relative_difference']:.2g} of the largest, and {BOUND:g} is allowed. It was not published."
        )
    return found


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the two sides that a request names."""
    import torch

    from titan_ckpt.location import place_of
    from titan_convert.convert import Options, read
    from titan_convert.slices import Cut

    start = time.perf_counter()
    options = Options(keys=request["keys"], config=request["config"])
    ours = read("dcp", place_of(request["native"]), options)
    cut = Cut(ours.model.config)
    tokens = torch.randint(0, cut.small.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = _native_logits(ours, cut, tokens, request["dtype"])
        logits = {"hf": _transformers_logits, "llama": _meta_logits}[request["kind"]]
        theirs = logits(place_of(request["foreign"]), cut, tokens, request["dtype"])
    difference = float((mine - theirs).abs().max())
    largest = float(theirs.abs().max())
    return {
        "difference": difference,
        "relative_difference": difference / largest if largest else float("nan"),
        "tokens": _TOKENS,
        "layers": list(cut.layers),
        "vocabulary_rows": cut.small.vocab_size,
        "experts": cut.experts,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _native_logits(source: Any, cut: Any, tokens: Any, dtype: str | None) -> Any:
    """Of our model."""
    import torch

    vocabulary = {"tok_embeddings.weight": 0, "lm_head.weight": 0}
    kept = cut.tensors(source.native.mapped.tensors, vocabulary, r"\.experts\.w\d$", r"\.router\.")
    model = cut.small.build()
    model.load_state_dict({name: _full(tensor, dtype) for name, tensor in kept.items()}, strict=False)
    if cut.small.tie_embeddings and model.lm_head is not None and model.tok_embeddings is not None:
        model.lm_head.weight = model.tok_embeddings.weight
    return model(tokens, torch.arange(tokens.shape[1])[None])


def _transformers_logits(place: Any, cut: Any, tokens: Any, dtype: str | None) -> Any:
    """Of transformers' model, from a folder with the slice that it loads as it would the whole."""
    import torch
    from transformers import AutoModelForCausalLM

    from titan_ckpt.formats.hugging_face import CONFIG_NAME, SINGLE_NAME, read_hugging_face
    from titan_ckpt.formats.lazy import cast
    from titan_ckpt.formats.safetensors import write_safetensors
    from titan_ckpt.formats.streams import create
    from titan_ckpt.local_place import LocalPlace

    config = json.loads(place.read(CONFIG_NAME))
    whole = read_hugging_face(place).tensors
    kept = cut.tensors(whole, {"model.embed_tokens.weight": 0, "lm_head.weight": 0}, r"^$", r"\.mlp\.gate\.weight$")
    small = {"vocab_size": cut.small.vocab_size, "num_hidden_layers": len(cut.layers), "layer_types": None}
    if cut.small.moe is not None:
        dense = list(range(cut.small.moe.first_dense_layers))
        small |= dict.fromkeys(("num_experts", "num_local_experts") & config.keys(), cut.experts)
        small["mlp_only_layers"] = dense
    tokens_ids = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps({**config, **small, **tokens_ids}))
        with create(LocalPlace(Path(folder)), SINGLE_NAME) as file:
            write_safetensors(file, {n: cast(t, getattr(torch, dtype)) if dtype else t for n, t in kept.items()})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        if wrong := sorted(name for names in report.values() for name in names):
            raise CheckpointError(f"transformers doesn't load the folder's names: {', '.join(map(str, wrong[:8]))}.")
        return model.eval()(tokens).logits


def _meta_logits(place: Any, cut: Any, tokens: Any, dtype: str | None) -> Any:
    """Of the formulas of Meta's release."""
    from titan_ckpt.formats.meta import PARAMS_NAME, read_meta
    from titan_convert.meta_reference import SPLITS, logits

    split = {f"layers.{i}.{name}": dim for name, dim in SPLITS.items() for i in range(cut.config.layers)}
    whole = read_meta(place, {**split, **SPLITS}).tensors
    kept = cut.tensors(whole, {"tok_embeddings.weight": 0, "output.weight": 0}, r"^$", r"^$")
    weights = {name: _full(tensor, dtype) for name, tensor in kept.items()}
    return logits(json.loads(place.read(PARAMS_NAME)), weights, tokens, len(cut.layers), cut.config.rope_scaling)


def _full(tensor: Any, dtype: str | None) -> Any:
    """A tensor in float32, rounded on the way if the result was."""
    import torch

    rows = tensor.all()
    return (rows.to(getattr(torch, dtype)) if dtype else rows).to(torch.float32)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))) + "\n")
