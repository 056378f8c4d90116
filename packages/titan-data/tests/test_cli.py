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
    assert said.startswith("titan-tokenize: data.source 'nothing.jsonl' does not exist")
    with pytest.raises(SystemExit):
        run("corpus.jsonl")


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
