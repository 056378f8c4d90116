"""Refuses to release what is not ready, or raises a member's version: `nox -s release` calls it, and needs no package.

    python scripts/release.py packages/titan-core                   # is it ready? prints its tag
    python scripts/release.py packages/titan-core --bump minor      # writes the next version into its files
    python scripts/release.py packages/titan-core --tag titan-core-v0.2.0   # is it ready, and what this tag says?

Nothing is built, tagged, pushed or published.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PARTS = ("major", "minor", "patch")
_HEADING = re.compile(r"^## (\S+) \((.*)\)$", re.MULTILINE)
_PENDING = "not yet released"


class ReleaseError(RuntimeError):
    """It cannot be released as it is; the message says what to do."""


def check(folder: Path, tag: str | None = None) -> str:
    """Whether the member in `folder` is ready; returns its tag.

    Args:
        folder: in a git repository.
        tag: what is being released, if the tag is made already; otherwise it must not exist.

    Raises:
        ReleaseError: if files are not committed, the version stands differently in two places, is taken, or has no
            finished section in the changelog.
    """
    _check_clean(folder)
    name, version = _project(folder)
    expected = f"{name}-v{version}"
    if tag is not None and tag != expected:
        raise ReleaseError(
            f"The tag {tag} does not fit {name} {version}, whose tag is {expected}; delete the tag (git push --delete "
            f"origin {tag}), and set the right one, or commit the version first (--bump)."
        )
    if tag is None and _git(folder, "tag", "--list", expected):
        raise ReleaseError(
            f"{name} {version} is released: the tag {expected} exists. Raise the version with --bump patch, minor or "
            "major, commit, and release that."
        )
    headings = dict(_HEADING.findall((folder / "CHANGELOG.md").read_text()))
    today = datetime.date.today().isoformat()
    if version not in headings:
        raise ReleaseError(
            f"{folder / 'CHANGELOG.md'} has no section for {version}; write what changes for the user under the "
            f"heading '## {version} ({today})', and commit it."
        )
    if headings[version] == _PENDING:
        raise ReleaseError(
            f"{folder / 'CHANGELOG.md'} says that {version} is {_PENDING}; change that heading to '## {version} "
            f"({today})', and commit it."
        )
    return expected


def bump(folder: Path, part: str) -> str:
    """Raises `part` of the version in the member's files, opens its section in the changelog, returns the version.

    Raises:
        ReleaseError: if files are not committed, or the version stands differently in two places.
    """
    _check_clean(folder)
    _, old = _project(folder)
    numbers = [int(number) for number in old.split(".")]
    at = PARTS.index(part)
    new = ".".join(map(str, [*numbers[:at], numbers[at] + 1, *[0] * (2 - at)]))
    for path in (folder / "pyproject.toml", _init(folder)):
        spelt = re.compile(rf'^(version|__version__) = "{re.escape(old)}"$', re.MULTILINE)
        path.write_text(spelt.sub(rf'\g<1> = "{new}"', path.read_text(), count=1))
    changelog = folder / "CHANGELOG.md"
    text = changelog.read_text()
    opened, first = f"## {new} ({_PENDING})", _HEADING.search(text)
    if first and first[2] == _PENDING:
        text = text.replace(first[0], opened, 1)
    elif first:
        text = text.replace(first[0], f"{opened}\n\n{first[0]}", 1)
    else:
        text += f"\n{opened}\n"
    changelog.write_text(text)
    return new


def ranges(root: Path, name: str) -> list[str]:
    """Where members of the repository in `root` say which versions of `name` they take: `file: requirement`."""
    found = []
    for path in sorted(root.glob("*/*/pyproject.toml")):
        requirements = tomllib.loads(path.read_text())["project"].get("dependencies", [])
        found += [f"{path.relative_to(root)}: {text}" for text in requirements if re.match(rf"{name}\b(?!-)", text)]
    return found


def _project(folder: Path) -> tuple[str, str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    init = _init(folder)
    found = re.search(r'^__version__ = "(.*)"$', init.read_text(), re.MULTILINE)
    if found is None or found[1] != version:
        said = f"says {found[1]}" if found else "has no __version__"
        raise ReleaseError(
            f"{folder / 'pyproject.toml'} says {version} and {init} {said}; make them agree, and commit."
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"{folder / 'pyproject.toml'} says {version}, which is not MAJOR.MINOR.PATCH; change it.")
    return name, version


def _init(folder: Path) -> Path:
    return next((folder / "src").glob("*/__init__.py"))


def _check_clean(folder: Path) -> None:
    changed = _git(folder, "status", "--porcelain", "--", ":/").splitlines()
    if changed:
        named = ", ".join(line[3:] for line in changed[:5]) + (", …" if len(changed) > 5 else "")
        raise ReleaseError(
            f"{len(changed)} files differ from what is committed ({named}), so nobody could build this release again; "
            "commit them, or release from a fresh clone."
        )


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ReleaseError(f"git {arguments[0]} says: {run.stderr.strip()}. A release needs a git clone.")
    return run.stdout.rstrip("\n")


def main() -> None:
    """Reads the command line; a refusal is one paragraph on standard error, and exit code 1."""
    parser = argparse.ArgumentParser(prog="release", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of the package or app")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--bump", choices=PARTS, help="write the next version instead")
    what.add_argument("--tag", help="the tag that is made already")
    options = parser.parse_args()
    try:
        if options.bump is None:
            print(check(options.folder, options.tag))
            return
        version = bump(options.folder, options.bump)
        print(f"{options.folder} is now {version}: say in its CHANGELOG.md what changes, commit, and release it.")
        name, _ = _project(options.folder)
        for line in ranges(options.folder.resolve().parents[1], name):
            print(f"Is {version} in this range? {line}")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
