"""What is refused before a release, and what raising a version changes; and that workflows call what there is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def clone(tmp_path):
    """A repository with a package that is ready, and an app that needs it."""
    for folder, name, needs in (
        ("packages/titan-some", "titan-some", []),
        ("packages/titan-some-more", "titan-some-more", ["titan-some-more>=1"]),
        ("apps/thing", "titan-thing", ["numpy>=2", "titan-some>=0.3,<0.4"]),
    ):
        module = tmp_path / folder / "src" / name.replace("-", "_")
        module.mkdir(parents=True)
        (module / "__init__.py").write_text('"""Some."""\n\n__version__ = "0.3.1"\n')
        (tmp_path / folder / "pyproject.toml").write_text(
            f'[project]\nname = "{name}"\nversion = "0.3.1"\ndependencies = {json.dumps(needs)}\n'
        )
        (tmp_path / folder / "CHANGELOG.md").write_text(
            f"# Changes to {name}\n\n## 0.3.1 (2026-11-22)\n\n- Less.\n\n## 0.3.0 (2026-10-01)\n\n- More.\n"
        )
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "Somebody")
    git(tmp_path, "config", "user.email", "somebody@example.com")
    commit(tmp_path)
    return tmp_path


def git(clone, *arguments):
    subprocess.run(["git", "-C", clone, *arguments], check=True, capture_output=True)


def commit(clone):
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "Change")


def release(clone, *arguments):
    script = [sys.executable, ROOT / "scripts" / "release.py", clone / "packages" / "titan-some"]
    return subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)


def refused(result):
    assert result.returncode == 1
    assert result.stderr.startswith("release: ")
    assert result.stderr.count("\n") == 1, "one paragraph"
    return result.stderr


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_what_is_ready_says_its_tag(clone):
    assert release(clone).stdout == "titan-some-v0.3.1\n"
    assert release(clone, "--tag", "titan-some-v0.3.1").returncode == 0


def test_files_that_are_not_committed_are_refused(clone):
    (clone / "packages" / "notes.txt").write_text("mine")
    assert "1 files differ from what is committed (packages/notes.txt)" in refused(release(clone))
    assert "commit them" in refused(release(clone, "--bump", "minor"))


def test_a_version_that_is_released_is_refused_unless_its_tag_is_what_is_being_built(clone):
    git(clone, "tag", "titan-some-v0.3.1")
    assert "the tag titan-some-v0.3.1 exists" in refused(release(clone))
    assert release(clone, "--tag", "titan-some-v0.3.1").returncode == 0


def test_a_tag_of_another_version_or_package_is_refused(clone):
    for tag in ("titan-some-v0.4.0", "titan-thing-v0.3.1"):
        assert f"{tag} does not fit titan-some 0.3.1" in refused(release(clone, "--tag", tag))


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("CHANGELOG.md", "## 0.3.1 (2026-11-22)\n", "", "has no section for 0.3.1"),
        ("CHANGELOG.md", "2026-11-22", "not yet released", "change that heading to '## 0.3.1 ("),
        ("pyproject.toml", "0.3.1", "0.4.0", "says 0.3.1; make them agree"),
        ("src/titan_some/__init__.py", "__version__", "version", "has no __version__"),
    ],
)
def test_what_does_not_agree_is_refused(clone, file, old, new, says):
    replace(clone / "packages" / "titan-some" / file, old, new)
    commit(clone)
    assert says in refused(release(clone))


@pytest.mark.parametrize(("part", "version"), [("major", "1.0.0"), ("minor", "0.4.0"), ("patch", "0.3.2")])
def test_raising_a_version_leaves_what_can_be_released_once_it_is_described(clone, part, version):
    folder = clone / "packages" / "titan-some"
    result = release(clone, "--bump", part)
    assert f"is now {version}" in result.stdout
    assert "apps/thing/pyproject.toml: titan-some>=0.3,<0.4" in result.stdout
    assert "titan-some-more" not in result.stdout
    assert f'\nversion = "{version}"\n' in (folder / "pyproject.toml").read_text()
    assert f'__version__ = "{version}"\n' in (folder / "src" / "titan_some" / "__init__.py").read_text()
    changelog = (folder / "CHANGELOG.md").read_text()
    assert changelog.startswith(
        f"# Changes to titan-some\n\n## {version} (not yet released)\n\n## 0.3.1 (2026-11-22)\n"
    )
    commit(clone)
    assert "not yet released" in refused(release(clone))
    replace(folder / "CHANGELOG.md", "not yet released", "2026-12-24")
    commit(clone)
    assert release(clone).stdout == f"titan-some-v{version}\n"


def test_changes_that_are_described_already_move_to_the_version_that_is_raised(clone):
    changelog = clone / "packages" / "titan-some" / "CHANGELOG.md"
    replace(changelog, "2026-11-22", "not yet released")
    commit(clone)
    release(clone, "--bump", "minor")
    assert "## 0.4.0 (not yet released)\n\n- Less.\n\n## 0.3.0" in changelog.read_text()


def test_every_member_could_be_released_once_its_changelog_has_a_date():
    """Versions agree, and the changelog has a section for them."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from release import _HEADING, _project
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    folders = [path.parent for path in ROOT.glob("*/*/pyproject.toml")]
    assert len(folders) >= 8
    for folder in folders:
        _, version = _project(folder)
        assert version in dict(_HEADING.findall((folder / "CHANGELOG.md").read_text()))


@pytest.fixture(scope="module")
def sessions():
    """The names that nox knows; as text, since as JSON it lists only those that run by default."""
    command = [sys.executable, "-m", "nox", "--noxfile", ROOT / "noxfile.py", "--list", "--nocolor"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^[*-] (\S+) -> ", listed, re.MULTILINE)
    return {*names, *(name.split("(")[0] for name in names)}


def called(text):
    """The sessions that a text tells nox to run; GitHub's expressions and shell variables stand for any member."""
    names = re.findall(r"""nox -s (?:"([^"]+)"|([\w-]+))""", text)
    return [re.sub(r"\$\{\{.*?\}\}|\$\w+", "*", quoted or plain) for quoted, plain in names]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "CONTRIBUTING.md", ROOT / "README.md"], ids=lambda path: path.name)
def test_every_session_that_is_called_exists(path, sessions):
    names = called(path.read_text())
    assert names or "uvx nox" in path.read_text()
    for name in names:
        assert name in sessions or ("*" in name and any(fits(name, session) for session in sessions)), name


def fits(name, session):
    return re.fullmatch(re.escape(name).replace(r"\*", "[a-z-]+"), session)


def test_the_gpu_jobs_are_those_that_nox_has(sessions):
    members = [match[1] for session in sorted(sessions) if (match := re.fullmatch(r"gpu_tests\((.*)\)", session))]
    gpu = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())
    assert sorted(gpu["jobs"]["gpu_tests"]["strategy"]["matrix"]["member"]) == members
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    # No release goes without: neither its tests on a GPU nor what publishes has a condition of its own.
    assert not any("if" in jobs[name] for name in ("gpu_tests", "publish"))
    assert len(members) == 8


def test_what_publishes_runs_no_code_of_ours_and_waits_for_both_tests():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert not any("run" in step or "checkout" in step.get("uses", "") for step in jobs["publish"]["steps"])
    assert sorted(jobs["publish"]["needs"]) == ["build", "gpu_tests"]
    assert any("nox -s release" in step.get("run", "") for step in jobs["build"]["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
