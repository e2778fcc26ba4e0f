"""What `mkdocs build` needs beyond docs/: pages at the root of the repository are pages of the site too.

Their links stay those of the repository, so that every page reads alike there and on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where a file of the repository stands on the site.
AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
AS_THEY_ARE = ("CITATION.cff", "LICENSE")
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in AT_THE_ROOT.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for source in AS_THEY_ARE:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site; the mark of blocks that tests do not run goes."""
    site = page.file.src_uri
    repository = next((source for source, target in AT_THE_ROOT.items() if target == site), f"docs/{site}")

    def moved(match: re.Match[str]) -> str:
        opening, target, rest = match.groups()
        if re.match(r"\w+:", target):
            return match.group()
        at = posixpath.normpath(posixpath.join(posixpath.dirname(repository), target))
        at = AT_THE_ROOT.get(at, at.removeprefix("docs/"))
        return opening + posixpath.relpath(at, posixpath.dirname(site) or ".") + rest

    return re.sub(r"^(```\w+) norun$", r"\1", LINK.sub(moved, markdown), flags=re.MULTILINE)
