"""Links of pages to files of the repository that are outside of this folder, as they work on GitHub.

Some of these files are pages of the site too, by an `include`; the others are shown as their path.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
PAGES = {"benchmarks/RESULTS.md": "/results.md", "CHANGELOG.md": "/changelog.md", "CONTRIBUTING.md": "/contributing.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#\s]+)(#[^)\s]*)?\)")


def rewrite(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace in a page the links that leave this folder.

    :raises FileNotFoundError: if a link leads to no file of the repository.
    """
    page = Path(app.srcdir, name)

    def replaced(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if (page.parent / match[0].split("](")[1].split("#")[0].rstrip(")")).resolve().is_relative_to(app.srcdir):
            return match[0]  # from a folder of pages to another
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{name}: a link to {path}, which is not in the repository")
        return f"[{text}]({PAGES[path]}{anchor or ''})" if path in PAGES else f"{text} (`{path}`)"

    source[0] = LINK.sub(replaced, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register `rewrite`."""
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
