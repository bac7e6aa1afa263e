"""Put the badges into README.md that open this repository's lessons on Binder and on Colab: ``make badges``.

    python tools/badges.py                  # of the remote "origin" of this clone
    python tools/badges.py OWNER/REPO       # of a repository on GitHub
    python tools/badges.py --clear          # take them out

Exit code: 0, or 1 where no service could reach the repository.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from _notebooks import ROOT

from binder import FIRST, launch_address

README = ROOT / "README.md"
CLEARED = (
    "[Read the lessons](notebooks/README.md) · [Measured results](results/README.md) · To launch the lessons on Binder "
    "or Colab: push a public fork and run `make badges`."
)


def badges(remote: str) -> str:
    """The badges of a repository: Binder's, and Colab's where it is on GitHub.

    Args:
        remote: the repository as git knows it, or OWNER/REPO on GitHub.

    Raises:
        ValueError: the services cannot reach a repository there.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", remote):
        remote = f"https://github.com/{remote}"
    binder = launch_address(remote)
    found = f"[![Launch the lessons on Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    on_github = re.match(r"https://mybinder\.org/v2/gh/([^/]+/[^/]+)/HEAD\?", binder)
    if not on_github:
        return found
    colab = f"https://colab.research.google.com/github/{on_github[1]}/blob/main/{FIRST}"
    install = f'%pip install "dfqlib[notebooks,export] @ git+https://github.com/{on_github[1]}"'
    return (
        f"{found} [![Open lesson 01 in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"In Colab, run `{install}` in a cell of its own first."
    )


def with_badges(text: str, block: str) -> str:
    """The README with this block between its markers."""
    return re.sub(
        r"(<!-- badges -->\n).*?(\n<!-- end -->)", lambda match: match[1] + block + match[2], text, flags=re.DOTALL
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the README; return the exit code."""
    parser = argparse.ArgumentParser(description="Put launch badges into the README.")
    parser.add_argument("repository", nargs="?", metavar="OWNER/REPO", help='default: the remote "origin"')
    parser.add_argument("--clear", action="store_true", help="take the badges out")
    options = parser.parse_args(arguments)
    remote = options.repository
    if not remote and not options.clear:
        asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
        remote = asked.stdout.strip()
    try:
        block = CLEARED if options.clear else badges(remote)
    except ValueError as error:
        print(f"{error}; or name it: make badges OWNER/REPO", file=sys.stderr)
        return 1
    README.write_text(with_badges(README.read_text(encoding="utf-8"), block), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
