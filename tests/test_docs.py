"""Every block of the README, of docs/ and of the members' READMEs does what it says.

`pages` says what a block is, `commands` and `command_runs` how it is understood and run, `page_files` what a page
takes for granted. On a page each block is run, in order, or bears a mark and has its flags parsed. In the READMEs of
packages and apps, Python is run by their own tests, and the flags of commands are parsed here.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import commands
import page_files
from command_runs import run, run_python
from pages import Block, PageError, agrees, indented_lines, prose, read_blocks
from titan_models.facts import parameter_count
from titan_train.configs import llama3, qwen3
from titan_train.registry import config_functions

ROOT = Path(__file__).parents[1]
README, DOCS, GPU = ROOT / "README.md", ROOT / "docs", ROOT / "benchmarks" / "gpu" / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md")), GPU]
MEMBERS = sorted([*ROOT.glob("packages/*/README.md"), *ROOT.glob("apps/*/README.md")])

# What takes longer than a few seconds even here: parsed by default, run by the slow test.
LONG = (
    "llama3_405b",
    "--nproc-per-node 8",
    "--dry-run --world-size 8 --config llama3_8b",
    "hf-to-dcp Qwen3-0.6B qwen3",
)
# Pages whose blocks are parsed by default and run by the slow test: what they name is run by tests of its own.
RUN_SELDOM = tuple(
    DOCS / f"{page}.md" for page in ("debugging", "low-precision", "new-model", "parallelism", "performance")
)
# Run by a test of its own, on a model that is tiny.
ELSEWHERE = ("scripts/converging.py",)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    page_files.write_library(folder)
    return page_files.make_small(folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory, library):
    folder = tmp_path_factory.mktemp("files")
    page_files.write_files(folder, library)
    return folder


@pytest.fixture
def folder(files, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


def write_file(block: Block, folder: Path) -> None:
    path = folder / block.title
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    if path.suffix == ".json":
        json.loads(block.text)
    elif path.suffix == ".yaml":
        yaml.safe_load(block.text)
    elif path.suffix == ".py":
        compile(block.text, block.where, "exec")


def is_short(text: str) -> bool:
    return not any(word in text for word in LONG)


def follow(page: Path, folder: Path, setup=lambda: None, *, runs=is_short) -> None:
    """Does what a reader of the page would do; checks the flags of what cannot be done here, or does not `run`."""
    printed: str | None = None
    whole = False  # whether all that the last block says was run
    for block in read_blocks(page):
        if block.title is not None:
            write_file(block, folder)
        elif block.language == "bash":
            printed, whole = "", block.mark is None
            for line in block.commands:
                command = commands.parse(line)
                if not command.refused:
                    commands.check_flags(command, folder)
                if block.mark is None and runs(line) and not any(word in line for word in ELSEWHERE):
                    printed += run(command, folder, setup)
                else:
                    whole = False
        elif block.language == "python":
            whole = runs(block.text)
            printed = run_python(block.text, block.where, folder, setup) if whole else ""
        elif block.language == "text" and printed is not None:
            if whole and not agrees(block.text, printed):
                raise PageError(f"{block.where} claims\n{block.text}\nprinted was\n{printed}")
        else:
            raise PageError(f"{block.where} can be neither run nor compared; give it a title if it is a file.")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_does_what_it_says(page, folder, library):
    follow(page, folder, library, runs=(lambda text: False) if page in RUN_SELDOM else is_short)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != GPU and (p in RUN_SELDOM or not is_short(p.read_text()))], ids=name
)
def test_what_takes_long_does_what_it_says(page, folder, library):
    follow(page, folder, library, runs=lambda text: True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_has_no_code_without_a_fence(page):
    assert indented_lines(page) == []


@pytest.mark.parametrize("page", MEMBERS, ids=name)
def test_the_commands_of_a_member_are_understood(page, folder):
    blocks = read_blocks(page)
    fenced = [line for block in blocks if block.language in ("bash", "console") for line in block.commands]
    known = ("pip", "torchrun", *commands.PROGRAMS)
    indented = [line for line in indented_lines(page) if line.split()[0] in known and "[--" not in line]
    assert fenced or indented
    for line in [*fenced, *indented]:
        commands.check_flags(commands.parse(line), folder)
    if any(block.language in ("python", "console") for block in blocks):
        assert (page.parent / "tests" / "test_readme.py").exists()


# -- What a page says between its blocks


def known_flags() -> set[str]:
    found = set()

    def collect(section, prefix):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            flag = f"{prefix}{field.name}".replace("_", "-")
            if dataclasses.is_dataclass(value):
                collect(value, f"{flag}.")
            else:
                found.add(flag)
                if value is True or value is False:
                    found.add(".".join([*flag.split(".")[:-1], "no-" + flag.split(".")[-1]]))

    collect(llama3.llama3_debug(), "")
    collect(qwen3.qwen3_debug_moe(), "")
    return found


@pytest.mark.parametrize("page", [*PAGES, *MEMBERS], ids=name)
def test_every_flag_that_is_named_exists(page):
    text = prose(page)
    if page.name == "from-torchtitan.md":  # whose first column has the flags of another program
        text = re.sub(r"^\| .*? \|", "", text, flags=re.MULTILINE)
    known = known_flags()
    for flag in re.findall(r"`--([a-z-]+(?:\.[a-z0-9-]+)+)", text):
        assert flag in known or any(each.startswith(f"{flag}.") for each in known), f"{page}: --{flag}"


def test_what_stands_for_a_flag_of_torchtitan_is_understood():
    rows = re.findall(r"^\| `--.*? \| (.*) \|$", (DOCS / "from-torchtitan.md").read_text(), re.MULTILINE)
    found = [text for row in rows for text in re.findall(r"`(--[^`]+)`", row)]
    assert len(found) > 60
    waiting = {text: shlex.split(text) for text in found}
    while waiting:  # at once what does not say two things of one flag
        batch: dict[str, list[str]] = {}
        for text, words in list(waiting.items()):
            flags = [word for word in words if word.startswith("--")]
            if not any(flag in said for said in batch.values() for flag in flags):
                batch[text] = waiting.pop(text)
        commands.check_spelling([word for words in batch.values() for word in words])


def test_every_configuration_is_listed_with_its_size():
    text = README.read_text()
    for function in [*config_functions(llama3), *config_functions(qwen3)]:
        assert f"`{function}`" in text
    assert f"{parameter_count(llama3.llama3_debug().model):,} parameters" in text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_exists(page):
    text = prose(page)
    for link in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|packages|apps|scripts|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


# -- GPU benchmarks


def gpu_commands() -> list[str]:
    blocks = [block for block in read_blocks(GPU) if block.language == "bash"]
    assert all(block.mark == "gpu" for block in blocks)
    return [line for block in blocks for line in block.commands]


def test_each_row_of_a_gpu_benchmark_has_a_command_and_a_source():
    rows = re.findall(r"^\| .* \| (.*?) \| not measured \|$", GPU.read_text(), re.MULTILINE)
    assert len(rows) == len(gpu_commands()) >= 20
    assert all(re.fullmatch(r"[\d,]+|none", published) for published in rows)
    assert len(re.findall(r"\]\(https://", GPU.read_text())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("line", gpu_commands())
def test_the_layout_of_a_gpu_benchmark_can_be_explained(line, folder):
    command = commands.parse(line)
    arguments = ("--explain", "--world-size", str(command.ranks), *command.arguments)
    explained = dataclasses.replace(command, ranks=1, arguments=arguments)
    assert f"{command.ranks} ranks" in run(explained, folder)


# -- The site


def build(folder: Path) -> subprocess.CompletedProcess:
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run(
        [zensical, "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_site_is_built_and_a_broken_link_fails(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "converging" / "index.html").exists()
    for broken in ("[nowhere](nowhere.md)", "[nowhere](data.md#nowhere)"):
        (tmp_path / "docs" / "index.md").write_text(f"# titan\n\n{broken}\n")
        assert build(tmp_path).returncode != 0


def test_every_page_is_in_the_navigation():
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w-]+\.md", str(sections))
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_page_begins_with_what_one_can_do_after_it():
    for page in DOCS.glob("*.md"):
        assert re.match(r"# .+\n\nAfter this page you ", page.read_text()), page


# -- The harness itself


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("```\ntitan-train\n```", "is a block of"),
        ("```fortran\nend\n```", "is a block of"),
        ("```bash title=x.sh\n```", "is a block of"),
        ("```bash\nls\n", "has no end"),
        ("```bash\nrm -rf runs\n```", "no program that is known"),
        ("```bash\npip install titan-core\n```", "only be in a block with a mark"),
        ("```bash\n# network\npip install ./packages/titan-cor\n```", "there is no ./packages/titan-cor"),
        ("```bash\n# network\npip install './packages/titan-data[nothing]'\n```", "has no extra nothing"),
        ("```bash\n# gpu\ntitan-train --parallel.tpp 2\n```", "--parallel.tpp"),
        ("```bash\n# gpu\ntorchrun --nproc-per-node 3 -m titan_train --parallel.tp 2\n```", "parallel"),
        ("```bash\n# gpu\ntorchrun --nprocs 3 -m titan_train\n```", "torchrun"),
        ("```bash\n# cluster\nscripts/run_train.sh --config llama3_9b\n```", "llama3_9b"),
        ("```bash\ntitan-compare nowhere elsewhere\n```", "ended with"),
        ("```bash\ntitan-convert --help   # refused\n```", "ended with"),
        ("```bash\ntitan-trace runs --nothing\n```", "does not know --nothing"),
        ("```python\nraise ValueError('no')\n```", "no"),
        ("```python\nprint('words')\n```\n```text\nother words\n```", "claims"),
        ("```text\nwords\n```", "neither run nor compared"),
        ('```json title="x.json"\n{\n```', "Expecting"),
    ],
)
def test_what_cannot_be_checked_or_is_wrong_fails(text, why, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{text}\n")
    with pytest.raises((AssertionError, ValueError), match=re.escape(why)):
        follow(page, tmp_path)


def test_what_is_claimed_is_compared_by_its_words():
    printed = "one\nstep 3 of 10, loss 4.25e-3\nmuch\nmore\nlast line 7 \n"
    for claimed in ("one", "step 9 of 90, loss 1.0\n…\nlast line 8", "…\nlast … 7", "one\n…"):
        assert agrees(claimed, printed), claimed
    for claimed in ("two", "one\nmuch", "step 3 of ten, loss 4.25e-3", "more\nmuch", "last line", "on"):
        assert not agrees(claimed, printed), claimed


def test_files_of_a_page_are_found_by_its_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```text title="a/b.txt"\nwords\n```\n```bash\ncat a/b.txt\n```\n```text\nwords\n```\n')
    follow(page, tmp_path)
