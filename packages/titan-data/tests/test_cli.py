import json
import subprocess
import sys
from pathlib import Path

import pytest

from titan_data.cli import main
from titan_data.config import DataConfig
from titan_data.dataset import open_dataset


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, bpe_folder):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"q": f"woods {i}?", "text": f"Whose woods {i}\n"}) for i in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))

    def run(*arguments):
        status = main([*arguments, *(["--cache-dir", "cache"] if "--verify" not in arguments else [])])
        return status, capsys.readouterr().err

    return run


def test_a_corpus_becomes_a_folder_that_training_reads(run, bpe_folder):
    status, said = run("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder), "--workers", "2")
    assert status == 0
    assert "200 documents, 1 shards of uint16, tokenized on tokenizers" in said
    assert "100%" in said
    data = open_dataset(DataConfig(source="tokens"))
    text = open_dataset(DataConfig(source="corpus.jsonl", tokenizer=str(bpe_folder), cache_dir="cache"))
    assert data.fingerprint == text.fingerprint
    assert data.store.read(0, data.token_count).tolist() == text.store.read(0, text.token_count).tolist()


def test_verify(run, bpe_folder):
    assert run("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder))[0] == 0
    status, said = run("tokens", "--verify")
    assert status == 0
    assert "tokens: whole; 4 files are as they were written" in said
    file = Path("tokens") / "shard-00000.tokens.bin"
    file.write_bytes(file.read_bytes()[::-1])
    status, said = run("tokens", "--verify")
    assert status == 1
    assert "titan-tokenize: tokens is damaged: shard-00000.tokens.bin: its bytes are not those" in said
    assert run("nowhere", "--verify") == (1, "titan-tokenize: nowhere does not exist\n")
    for place in (".", "corpus.jsonl"):
        status, said = run(place, "--verify")
        assert status == 1
        assert f"{place} is no folder of tokens" in said


def test_options_reach_the_documents_and_the_tokenizer(run):
    arguments = ["--template", r"{q}\n{text}", "--format", "jsonl", "--vocab-size", "290", "--shard-mb", "1"]
    assert run("corpus.jsonl", "tokens", *arguments)[0] == 0
    data = open_dataset(DataConfig(source="tokens"))
    assert data.tokenizer.decode(data.store[7]) == "woods 7?\nWhose woods 7\n<|end_of_text|>"
    assert data.vocab_size <= 290


def test_the_same_command_again_is_content_with_what_is_there(run, bpe_folder):
    command = ("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder))
    assert run(*command)[0] == 0
    assert run(*command)[0] == 0
    status, said = run("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder), "--text-field", "q")
    assert status == 1
    assert "tokens holds other tokens" in said


def test_errors_are_a_paragraph_and_a_status(run):
    status, said = run("nothing.jsonl", "tokens")
    assert status == 1
    assert said.startswith("titan-tokenize: there is no corpus 'nothing.jsonl'")
    with pytest.raises(SystemExit):
        run("corpus.jsonl")


@pytest.mark.parametrize("option", ["--shard-mb", "--workers"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_a_number_below_1_is_wrong_usage(run, capsys, option, value):
    with pytest.raises(SystemExit):
        run("corpus.jsonl", "tokens", option, value)
    assert f"{value} is too few; it takes at least 1" in capsys.readouterr().err
    assert not Path("tokens").exists()


def test_nothing_is_written_where_something_else_stands(run, bpe_folder):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("a")
    status, said = run("corpus.jsonl", "mine", "--tokenizer", str(bpe_folder))
    assert status == 1
    assert "mine is not empty: it holds thesis.tex" in said
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    status, said = run("corpus.jsonl", "mine/thesis.tex", "--tokenizer", str(bpe_folder))
    assert status == 1
    assert "mine/thesis.tex is a file, and tokens go into a folder" in said


def test_a_folder_that_cannot_be_written_is_named(run, bpe_folder):
    Path("file").touch()
    status, said = run("corpus.jsonl", "file/tokens", "--tokenizer", str(bpe_folder))
    assert status == 1
    assert "cannot write the tokens file/tokens: Not a directory. " in said
    assert "name another FOLDER" in said


def test_tokens_are_not_tokenized_again(run, bpe_folder):
    assert run("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder))[0] == 0
    status, said = run("tokens", "again", "--tokenizer", str(bpe_folder))
    assert status == 1
    assert "tokens is tokenized already" in said


def test_help_answers_without_numpy():
    code = (
        "import sys, titan_data.cli; print([m for m in ('torch', 'numpy', 'tokenizers', 'tqdm') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_tokenizing_and_reading_back_load_neither_torch_nor_a_tokenizer_that_is_not_needed(run, bpe_folder):
    assert run("corpus.jsonl", "tokens", "--tokenizer", str(bpe_folder))[0] == 0
    code = (
        "import sys\nfrom pathlib import Path\nfrom titan_data.token_store import open_store\n"
        "open_store(Path('tokens'))[3]\n"
        "print([m for m in ('torch', 'tokenizers', 'tiktoken') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
