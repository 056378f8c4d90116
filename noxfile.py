"""Every check and test of the repository: `uvx nox` runs them all, `uvx nox -l` lists them.

lint           style, types, walls between packages, declared dependencies, spelling
packages       each package and app alone: its wheel, its declared dependencies, its own tests
wheels         all wheels together: versions that refuse each other fail here
together       what needs several packages: real runs in one process and many
browser        the run report in headless Chromium, which is fetched if it is not installed
docs           the site of docs/; a link that leads nowhere fails
launchers      scripts/*.yaml against the schemas of SkyPilot and Kubernetes
slow           long sweeps, not part of the default
gpu_tests      a member's tests on a machine with a GPU; without one they fail rather than skip
release        one member: is it ready? Then its files in dist/, tested, and the commands that publish them
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("titan-core", "titan-models", "titan-data", "titan-ckpt", "titan-quant", "titan-metrics")
APPS = ("titan-train", "titan-convert")
FOLDERS = {name: ROOT / "packages" / name for name in PACKAGES} | {
    name: ROOT / "apps" / name.removeprefix("titan-") for name in APPS
}
# The packages that an app is built from; a package stands alone.
NEEDS = {"titan-train": PACKAGES, "titan-convert": ("titan-ckpt", "titan-models")}

# What has code of its own for a GPU, and tests of it. Of the others, all tests must pass where there is one.
WITH_GPU_TESTS = ("titan-core", "titan-models", "titan-quant", "titan-metrics", "titan-train")
SPELLED = (
    "README.md",
    "CONTRIBUTING.md",
    "noxfile.py",
    ".github",
    "packages",
    "apps",
    "tests",
    "benchmarks",
    "scripts",
    "docs",
    "mkdocs.yml",
)

YAML_STYLE = """
extends: default
rules:
  line-length: {max: 140}
  document-start: disable
  truthy: {check-keys: false}
  comments: {min-spaces-from-content: 1}
"""

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "packages", "wheels", "together", "browser", "docs", "launchers"]

if sys.platform not in ("linux", "darwin"):
    sys.exit(f"titan is tested on Linux and macOS, not on {sys.platform}; on Windows use WSL 2.")

# pip reads PIP_FIND_LINKS, uv reads UV_FIND_LINKS: a folder of wheels that serves one shall serve the other.
if links := os.environ.get("PIP_FIND_LINKS"):
    os.environ.setdefault("UV_FIND_LINKS", ",".join(links.split()))
os.environ.setdefault("UV_CONSTRAINT", str(ROOT / "constraints.txt"))

# Writing bytecode makes importing torch twice as fast, and tests start many processes.
TEST_ENV = {"PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def build_wheels(session: nox.Session, *names: str) -> list[str]:
    """Builds the members' wheels and returns their paths: never bare names, which a public index might answer."""
    folder = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        session.run("uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(FOLDERS[name]), external=True)
    return sorted(str(path) for path in folder.glob("*.whl"))


def install_member(session: nox.Session, name: str) -> None:
    """Installs a member's wheel with what it declares, and its test dependencies; nothing else."""
    session.install(*build_wheels(session, name, *NEEDS.get(name, ())))
    session.install("--group", f"{FOLDERS[name] / 'pyproject.toml'}:test")


def pytest(session: nox.Session, *arguments: str) -> None:
    """Runs pytest on installed packages, from the repository's root so that its settings count."""
    session.run("pytest", "--durations=5", "--quiet", *arguments, *session.posargs, env=TEST_ENV)


# What `packages` and `together` run.
DEFAULT = "not slow and not gpu and not browser and not launchers"

# Most tests wait for processes that start, one after another, on a machine that has more than one core.
SIDE_BY_SIDE = ("--numprocesses=2", "--dist=worksteal")


@nox.session
def lint(session: nox.Session) -> None:
    """Checks style, types, imports and spelling without running any of our code."""
    # Editable, since the types and the walls are checked in the sources themselves.
    session.install(*(f"--editable={FOLDERS[name]}" for name in (*PACKAGES, *APPS)))
    for name in ("titan-core", "titan-metrics", "titan-convert"):  # the extras that they import
        session.install("--group", f"{FOLDERS[name] / 'pyproject.toml'}:test")
    session.install("--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell", *SPELLED)
    session.run("shellcheck", "--external-sources", *map(str, sorted(ROOT.glob("scripts/*.sh"))))
    workflows = sorted(map(str, ROOT.glob(".github/workflows/*.yml")))
    session.run(
        "yamllint", "--strict", "--config-data", YAML_STYLE, *workflows, *sorted(map(str, ROOT.glob("scripts/*.yaml")))
    )
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", *workflows)
    session.run("lint-imports")
    session.run("pyrefly", "check")
    for folder in FOLDERS.values():
        with session.chdir(folder):
            session.run("deptry", "src", silent=True)


@nox.session
@nox.parametrize("member", [nox.param(name, id=name) for name in (*PACKAGES, *APPS)])
def packages(session: nox.Session, member: str) -> None:
    """Tests one member alone, in an environment that has only what it declares."""
    install_member(session, member)
    pytest(session, *SIDE_BY_SIDE, "-m", DEFAULT, str(FOLDERS[member] / "tests"))


@nox.session
def wheels(session: nox.Session) -> None:
    """Installs all wheels together, so that version ranges which refuse each other fail."""
    session.install(*build_wheels(session, *PACKAGES, *APPS))
    session.run("uv", "pip", "check", external=True)
    session.run("titan-train", "--print-config", silent=True)
    session.run("titan-convert", "--help", silent=True)
    session.run("titan-report", "--help", silent=True)


@nox.session
def together(session: nox.Session) -> None:
    """Tests that need several packages: layouts, resume, the command line, the README."""
    session.install(*build_wheels(session, *PACKAGES, *APPS))
    session.install("--group", "test")
    pytest(session, *SIDE_BY_SIDE, "-m", DEFAULT, "tests")


@nox.session
def browser(session: nox.Session) -> None:
    """Opens the run report in headless Chromium: $CHROMIUM, one on the PATH, or one that is fetched."""
    install_member(session, "titan-metrics")
    session.install("--group", f"{FOLDERS['titan-metrics'] / 'pyproject.toml'}:browser")
    known = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    chromium = os.environ.get("CHROMIUM") or next(filter(None, known), None)
    if chromium is None and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        folder = Path(session.create_tmp()) / "chromium"
        session.run("python", str(ROOT / "scripts" / "chromium.py"), str(folder))
        chromium = str(folder / "start-chromium")
    elif chromium is None:
        session.run("playwright", "install", "chromium")  # where the tests look for it
    session.env["CHROMIUM"] = chromium or ""
    pytest(session, "-m", "browser", str(FOLDERS["titan-metrics"] / "tests" / "report"))


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the site of docs/ into site/; `uv run --group docs zensical serve` shows it while you write."""
    session.install("--group", "docs")
    session.run("zensical", "build", "--strict", "--clean")


@nox.session
def launchers(session: nox.Session) -> None:
    """Holds scripts/*.yaml against the schemas of what reads them."""
    session.install("--group", "launchers")
    # SkyPilot keeps notes in the home directory, and its programs are of no use here.
    session.env["HOME"] = session.create_tmp()
    session.env["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    # Without torch, which the other tests of this folder need.
    pytest(session, "--noconftest", "-m", "launchers", "tests/test_launcher_schemas.py")


@nox.session
def slow(session: nox.Session) -> None:
    """Runs the long sweeps of all members and of `tests`."""
    session.install(*build_wheels(session, *PACKAGES, *APPS))
    session.install("--group", "test", "--group", "evaluation")
    for name in (*PACKAGES, *APPS):
        session.install("--group", f"{FOLDERS[name] / 'pyproject.toml'}:test")
    pytest(session, "-m", "slow", "tests", *(str(folder / "tests") for folder in FOLDERS.values()))


@nox.session
@nox.parametrize("member", [nox.param(name, id=name) for name in (*PACKAGES, *APPS)])
def gpu_tests(session: nox.Session, member: str) -> None:
    """Runs one member's GPU tests, or its usual ones if it has none; a machine without a GPU fails."""
    install_member(session, member)
    session.run("python", "-c", "import torch; assert torch.cuda.is_available(), 'this machine has no GPU'")
    pytest(session, "-m", "gpu" if member in WITH_GPU_TESTS else DEFAULT, str(FOLDERS[member] / "tests"))


@nox.session(reuse_venv=False)
def release(session: nox.Session) -> None:
    """Builds and tests what a member's release would be; `-- titan-core`, or `-- titan-core --bump minor` before."""
    name, *flags = session.posargs or [""]
    if name not in FOLDERS:
        session.error(f"Say what to release: nox -s release -- NAME, which is one of {', '.join(FOLDERS)}.")
    session.run("python", "scripts/release.py", str(FOLDERS[name]), *flags)
    if "--bump" in flags:
        return
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("uv", "build", "--quiet", "--out-dir", str(dist), str(FOLDERS[name]), external=True)
    files = sorted(str(path) for path in dist.iterdir() if path.suffix in (".gz", ".whl"))
    session.run("uv", "tool", "run", "twine", "check", "--strict", *files, external=True)
    wheel = next(Path(path) for path in files if path.endswith(".whl"))
    session.install(str(wheel), *build_wheels(session, *NEEDS.get(name, ())))
    session.install("--group", f"{FOLDERS[name] / 'pyproject.toml'}:test")
    session.run("pytest", "--quiet", *SIDE_BY_SIDE, "-m", DEFAULT, str(FOLDERS[name] / "tests"), env=TEST_ENV)
    tag = f"{name}-v{wheel.name.split('-')[1]}"
    session.log(f"Ready. To publish: git tag --annotate {tag} --message {tag} && git push origin {tag}")
