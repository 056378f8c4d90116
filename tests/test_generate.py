"""`titan-generate` on a Hugging Face folder, a run and a checkpoint: the tokens of transformers, on any ranks."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import transformers

from ranks import run_ranks
from titan_data.bpe import train_bpe
from titan_data.tokenizer_files import load_tokenizer
from titan_train import generate_cli
from titan_train.generate import generate_text
from training_runs import TINY, change, layout, train

PROMPTS = ["Whose woods these are", "x", "I think I know. His house is in the village"]
SHAPE = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    kinds = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    }
    model, config = kinds[request.param]
    reference = model(config(**SHAPE, initializer_range=0.3, bos_token_id=None, eos_token_id=None))
    reference.save_pretrained(path)
    for name, content in train_bpe([prompt * 5 for prompt in PROMPTS], 280).items():
        (path / name).write_bytes(content)
    return path


def generated(*arguments: object) -> tuple[str, str]:
    """What the command prints on its two outputs, on this rank."""
    out, err = io.StringIO(), io.StringIO()
    options = generate_cli.build_parser().parse_args([*map(str, arguments), "--device", "cpu"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert generate_text(options) == 0
    return out.getvalue(), err.getvalue()


def texts(output: str) -> list[str]:
    return [part.partition("\n")[2].removesuffix("\n") for part in output.split("--- ")[1:]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_greedy_text_is_that_of_transformers(folder: Path, ranks: int) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    expected = []
    for ids in tokenizer.encode_batch(PROMPTS):
        tokens = torch.tensor(ids.astype("int64"))[None]
        mask = torch.ones_like(tokens)
        found = reference.generate(tokens, attention_mask=mask, max_new_tokens=25, do_sample=False)
        expected.append(tokenizer.decode(found[0].tolist()))
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    arguments = [folder, *prompts, "--max-new-tokens", 25, "--dtype", "float64", "--no-bos"]
    if ranks == 1:
        ours = generated(*arguments)
    else:
        ours, *others = run_ranks(ranks, generated, *arguments)
        assert others == [("", "")] * (ranks - 1)
    # Ours stops after the token that ends a document, which transformers was not told of.
    for own, whole in zip(texts(ours[0]), expected, strict=True):
        assert whole.startswith(own)
        assert own == whole or own.endswith(tokenizer.decode([tokenizer.eos_id]))
    assert "tokens in" in ours[1]


def test_one_text_is_told_as_it_grows_and_several_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    together = texts(generated(folder, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12)[0])
    alone = [generated(folder, "--prompt", prompt, "--max-new-tokens", 12)[0] for prompt in PROMPTS]
    assert [text.removesuffix("\n") for text in alone] == together
    drawn = ["--prompt", PROMPTS[0], "--temperature", 1, "--top-k", 20]
    assert generated(folder, *drawn, "--seed", 1)[0] == generated(folder, *drawn, "--seed", 1)[0]
    assert generated(folder, *drawn, "--seed", 1)[0] != generated(folder, *drawn, "--seed", 2)[0]


def test_a_run_and_its_checkpoint_and_its_adapters(tmp_path: Path) -> None:
    config = change(TINY, **{"training.steps": 2, "schedule.total_steps": 2, "lora.rank": 2, "optimizer.lr": 0.1})
    config = change(config, **{"export.format": "huggingface"})
    train(config, tmp_path / "run", 2, **layout(tp=2))
    places = ["run", "run/checkpoints/step-2", "run/hugging_face/step-2"]
    found = [generated(tmp_path / place, "--prompt", "import ", "--no-bos")[0] for place in places]
    assert found[0] == found[1] == found[2]


def test_a_chat(tmp_path: Path) -> None:
    sft = {"data.kind": "sft", "data.source": "conversations", "data.sft.template": "chatml"}
    sft |= {"data.sft.too_long": "truncate", "training.steps": 1, "schedule.total_steps": 1}
    train(change(TINY, **sft), tmp_path / "run")
    said = generated(tmp_path / "run", "--prompt", "Hello", "--chat", "--system", "Be brief.", "--max-new-tokens", 5)
    assert "Hello" not in said[0]
    assert "tokens in" in said[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{nowhere}", "--prompt", "x"], 2, "There is nothing at {nowhere}. Name a run's directory"),
        (["{empty}", "--prompt", "x"], 2, "There is nothing at {empty}. Name a run's directory"),
        (["{folder}", "--prompt", "", "--no-bos"], 2, "every prompt needs a token"),
        (["{folder}", "--prompt", "x", "--top-k", "5"], 2, "temperature 0 takes the best"),
        (["{folder}", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1"),
        (["{folder}", "--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["{folder}", "--prompt", "x", "--seed", "3"], 2, "--seed fixes what is drawn, and --temperature 0"),
        (["{folder}", "--prompt", "x", "--system", "y"], 2, "--system is for conversations; add --chat"),
        (["{folder}", "--prompt", "x", "--template", "y"], 2, "--template is for conversations; add --chat"),
        (["{folder}", "--prompt", "x", "--chat", "--bos"], 2, "have no effect with --chat"),
        (["{folder}", "--prompts", "{nowhere}"], 2, "name a text file with a prompt in each line with --prompts"),
        (["{folder}", "--prompts", "{empty}/../no_text"], 2, "it is not UTF-8"),
        (["{folder}", "--prompts", "/dev/null"], 2, "/dev/null is empty; name a text file"),
        (["{folder}"], 2, "one of the arguments --prompt --prompts is required"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph(
    folder: Path,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"folder": folder, "nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    (tmp_path / "no_text").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SystemExit) as ended:
        generate_cli.main([argument.format(**places) for argument in arguments])
    assert ended.value.code == code
    assert message.format(**places) in capsys.readouterr().err
