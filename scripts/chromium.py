"""Fetches a headless Chromium for tests that look at a page, from the npm registry: FOLDER/start-chromium starts it.

    python scripts/chromium.py FOLDER        # needs npm, and Linux on x86_64; does nothing if it is there

The package was made for machines that have nothing: the libraries and a font come with it. (`playwright install
chromium` fetches a binary from elsewhere, which not every network allows, and wants system libraries.)
"""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"

_UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath()"
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><dir>/usr/share/fonts</dir><cachedir>{folder}/fonts-cache</cachedir></fontconfig>
"""
_START = """#!/bin/sh
export FONTCONFIG_FILE='{folder}/fonts.conf' LD_LIBRARY_PATH='{folder}/al2023/lib'
exec '{folder}/chromium' "$@"
"""


def fetch(folder: Path) -> None:
    """Puts Chromium into `folder`, unless it is there.

    Raises:
        subprocess.CalledProcessError: if npm cannot fetch the package, or it cannot be unpacked.
    """
    folder = folder.resolve()
    start = folder / "start-chromium"
    if start.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ("--no-audit", "--no-fund", "--loglevel=error")
    subprocess.run(["npm", "install", "--prefix", str(folder), *quiet, PACKAGE], check=True)
    # It unpacks to the temporary folder, and the libraries only where it takes itself to be on AWS Lambda.
    settings = os.environ | {"TMPDIR": str(folder), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
    unpack = ["node", "--input-type=module", "--eval", _UNPACK]
    subprocess.run(unpack, check=True, cwd=folder, env=settings)
    (folder / "fonts.conf").write_text(_FONTS.format(folder=folder))
    partial = start.with_suffix(".partial")
    partial.write_text(_START.format(folder=folder))
    partial.chmod(0o755)
    partial.replace(start)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
