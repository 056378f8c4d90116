"""Text from trained weights, on one device or shared by tensor-parallel ranks; the first rank writes it as it comes."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from titan_ckpt.location import place_of
from titan_core.config import ParallelConfig
from titan_data.chat import ChatTokenizer
from titan_data.chat_template import open_template
from titan_data.errors import about
from titan_data.sft_config import SFTConfig
from titan_data.token_text import control_tokens
from titan_data.tokenizer import Tokenizer
from titan_data.tokenizer_files import load_tokenizer
from titan_models.generate import Sampling, check_request, generate
from titan_models.hugging_face_files import GENERATION_FILE
from titan_quant.config import DType, MixedPrecision
from titan_train.build import lay_out
from titan_train.config import TrainConfig
from titan_train.environment import Environment, environment
from titan_train.origin import Origin, OriginError, find_origin
from titan_train.validate import validate
from titan_train.weights import load_weights

_ENDS_OF_TURNS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")
_REPLACEMENT = "\ufffd"  # what bytes of a character that is not complete yet decode to


class PromptsError(ValueError):
    """There are no prompts to go on from."""


def generate_text(options: argparse.Namespace) -> int:
    """What `titan-generate` does once its command line is read; returns the exit code."""
    origin = _find(options.path)
    if origin.tokenizer is None:
        raise OriginError(f"{options.path} has no tokenizer beside its weights; put a tokenizer.json there.")
    tokenizer = load_tokenizer(Path(origin.tokenizer))
    prompts = _prompts(options, tokenizer, origin)
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed or 0
    )
    check_request(prompts, options.max_new_tokens, sampling)  # before the weights are read, which takes its time
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = TrainConfig(
        model=origin.model,
        parallel=ParallelConfig(tp=world_size, dp_shard=1, sequence_parallel=world_size == 1),
        device=cast(Literal["auto", "cpu", "cuda"], options.device),
    )
    validate(config, world_size)
    with environment(config) as env:
        dtype = cast(DType, options.dtype or ("bfloat16" if env.device.type == "cuda" else "float32"))
        model = lay_out(replace(config, precision=MixedPrecision(master_dtype=dtype)), env)
        model.give_memory(env.device)
        load_weights(model.model, origin, verify_hashes=options.verify_hashes)
        model.model.eval()
        steps = generate(
            model.model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            stop=_stops(tokenizer, origin, chat=options.chat),
            sampling=sampling,
            device=env.device,
        )
        shown = [""] * len(prompts) if options.chat else [tokenizer.decode(prompt) for prompt in prompts]
        _write(env, tokenizer, shown, steps)
    return 0


def _find(location: str) -> Origin:
    try:
        return find_origin(location, option="")
    except OriginError as error:
        place = place_of(location)
        if place.path is None or (place.path.exists() and place.files()):
            raise
        raise OriginError(
            f"There is nothing at {location}. Name a run's directory with a checkpoint in it, a checkpoint, or a "
            "Hugging Face folder."
        ) from error


def _texts(options: argparse.Namespace) -> list[str]:
    if options.prompt:
        return options.prompt
    remedy = "name a text file with a prompt in each line with --prompts, or say it with --prompt TEXT."
    try:
        texts = options.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PromptsError(f"The prompts in {options.prompts} cannot be read ({why}); {remedy}") from error
    if not texts:
        raise PromptsError(f"{options.prompts} is empty; {remedy}")
    return texts


def _prompts(options: argparse.Namespace, tokenizer: Tokenizer, origin: Origin) -> list[list[int]]:
    texts = _texts(options)
    if options.chat:
        name = options.template or SFTConfig.template
        with about(f"--template {name}"):
            template = open_template(SFTConfig(template=name), tokenizer)
        chat = ChatTokenizer(tokenizer, template)
        before = [{"role": "system", "content": options.system}] if options.system else []
        return [chat.prompt([*before, {"role": "user", "content": text}]).tolist() for text in texts]
    wants_bos = not origin.is_checkpoint if options.bos is None else options.bos
    start = [tokenizer.bos_id] if wants_bos and tokenizer.bos_id is not None else []
    return [[*start, *ids.tolist()] for ids in tokenizer.encode_batch(texts)]


def _stops(tokenizer: Tokenizer, origin: Origin, *, chat: bool) -> set[int]:
    """Tokens after which a text is over."""
    stops = {tokenizer.eos_id}
    if chat:
        control = control_tokens(tokenizer)
        stops |= {control[name].id for name in _ENDS_OF_TURNS if name in control}
    if GENERATION_FILE in origin.place.files():
        ends = json.loads(origin.place.read(GENERATION_FILE)).get("eos_token_id")
        stops |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return stops


class _Text:
    """The text of tokens that come one by one, in pieces that are whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0
        self.whole = ""

    def add(self, token: int) -> str:
        """What this token adds."""
        self._ids.append(token)
        self.whole = self._tokenizer.decode(self._ids)
        if self.whole.endswith(_REPLACEMENT):  # the rest of the character is to come
            return ""
        return self.rest()

    def rest(self) -> str:
        """What was not told yet."""
        new, self._told = self.whole[self._told :], len(self.whole)
        return new


def _write(env: Environment, tokenizer: Tokenizer, prompts: Sequence[str], steps: Iterator[list[int | None]]) -> None:
    """Prints a text alone as it grows, several when all are there; and how fast it was, on standard error."""
    texts = [_Text(tokenizer) for _ in prompts]
    started, tokens, first = time.perf_counter(), 0, 0.0
    if env.is_main and len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for step in steps:
        first = first or time.perf_counter() - started
        for text, token in zip(texts, step, strict=True):
            if token is None:
                continue
            tokens += 1
            piece = text.add(token)
            if env.is_main and len(prompts) == 1:
                print(piece, end="", flush=True)
    if not env.is_main:
        return
    if len(prompts) == 1:
        print(texts[0].rest())
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text.whole}")
    seconds = time.perf_counter() - started
    print(
        f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.1f} a second, the first after {first:.2f} s",
        file=sys.stderr,
    )
