"""Reads the blocks of a Markdown page, and refuses those that nobody could check.

A page is read as a reader would use it, from top to bottom in one folder:

- ```bash: commands, one a line; a backslash goes on, && comes between two, `# refused` behind one says that it fails.
  They are run, unless the first line of the block is a comment with a mark that says what they need: `# gpu`,
  `# cluster` or `# network`. Then their flags are parsed.
- ```python: run in a process of its own.
- a block with title="NAME": the content of that file, which the blocks after it find.
- ```text: what the commands or the Python above it print. Words are compared, `…` stands for anything, and numbers may
  differ: they are another machine's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

MARKS = ("gpu", "cluster", "network")
LANGUAGES = ("bash", "console", "python", "text", "json", "yaml")

_FENCE = re.compile(r"(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>.*)")
_TITLE = re.compile(r'\s*title="(?P<title>[^"]+)"\s*')
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


class PageError(AssertionError):
    """A page has a block that cannot be checked; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page.name}:{self.line}"

    @property
    def mark(self) -> str | None:
        """What its commands need that a test does not have; None if they can be run."""
        first = re.match(rf"# ({'|'.join(MARKS)})\b", self.text)
        return first[1] if first and self.language == "bash" else None

    @property
    def commands(self) -> list[str]:
        """Of a block of commands: one string each, without the lines that are only comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [part for line in lines if line.strip() and not line.startswith("#") for part in line.split(" && ")]


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order.

    Raises:
        PageError: for a block without a known language, with words after it that mean nothing, or without an end.
    """
    blocks: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.fullmatch(lines[number])
        number += 1
        if opened is None:
            continue
        start, indent = number, opened["indent"]
        while number < len(lines) and lines[number] != f"{indent}```":
            number += 1
        if number == len(lines):
            raise PageError(f"{page.name}:{start} has no end.")
        text = "".join(line.removeprefix(indent) + "\n" for line in lines[start:number])
        number += 1
        title = _TITLE.fullmatch(opened["rest"])
        if opened["language"] not in LANGUAGES or (opened["rest"].strip() and title is None):
            raise PageError(
                f"{page.name}:{start} is a block of {lines[start - 1].strip()!r}; known are {', '.join(LANGUAGES)}, "
                'with or without title="NAME".'
            )
        name = title["title"] if title else None
        blocks.append(Block(page=page, line=start, language=opened["language"], title=name, text=text))
    return blocks


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def indented_lines(page: Path) -> list[str]:
    """What Markdown shows as code though no fence says so, or might."""
    return [line.strip() for line in prose(page).splitlines() if line.startswith("    ")]


def agrees(claimed: str, printed: str) -> bool:
    """Whether what a page says is printed is among what was printed: in order, line by line."""
    pattern = r"\s*\n".join(_line(line) for line in claimed.strip("\n").splitlines())
    return re.search(rf"^{pattern}\s*$", printed, re.MULTILINE) is not None


def _line(line: str) -> str:
    if line.strip() == "…":
        return r"[\s\S]*?"
    return "[ \t]*" + ".*?".join(_words(part) for part in line.strip().split("…"))


def _words(text: str) -> str:
    """`text` as a pattern in which numbers and the width of gaps may differ."""
    parts = re.split(r"(\s+)", text)
    return "".join(r"\s+" if part.isspace() else "".join(_number_or_words(part)) for part in parts)


def _number_or_words(part: str) -> list[str]:
    found, at = [], 0
    for number in _NUMBER.finditer(part):
        found += [re.escape(part[at : number.start()]), r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"]
        at = number.end()
    return [*found, re.escape(part[at:])]
