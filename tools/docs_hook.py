"""A hook of MkDocs: links from pages to files outside docs/ lead to the repository, or become plain text.

The Markdown files link to files of the checkout (`../README.md`, `../examples/by_hand.py`), which the site does not
contain. If `repo_url` is set, such a link is replaced by the address of the file in the repository. Otherwise the text
of the link remains, without the link. A link to a file that does not exist is left as it is: the strict build reports
it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|(`+)(?!`).*?(?<!`)\2(?!`)", re.M | re.S)
"""Fenced blocks and code spans. Brackets in them are no links."""
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((\.\./[^()\s#]*)(#[^()\s]*)?\)")
"""An inline link whose target begins with `../`: its text, path and fragment."""


def rewrite_links(markdown: str, page: str, root: Path, docs: str, repo_url: str | None) -> str:
    """Returns the Markdown of a page without links that leave the docs folder.

    Args:
        markdown: content of the page.
        page: path of the page relative to the docs folder, with forward slashes.
        root: folder of the repository.
        docs: path of the docs folder relative to `root`.
        repo_url: address of the repository; None or an empty string keeps only the text of the links.
    """

    def replaced(link: re.Match[str]) -> str:
        text, target, fragment = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(docs, posixpath.dirname(page), target))
        if path.startswith((f"{docs}/", "../")) or not (root / path).exists():
            return link[0]
        if not repo_url:
            return text
        view = "tree" if (root / path).is_dir() else "blob"
        return f"[{text}]({repo_url.rstrip('/')}/{view}/HEAD/{path}{fragment})"

    # Code is replaced by place holders first: the text of a link may be code, but code contains no link.
    code: list[str] = []

    def hidden(span: re.Match[str]) -> str:
        code.append(span[0])
        return f"\0{len(code) - 1}\0"

    result = _LINK.sub(replaced, _CODE.sub(hidden, markdown))
    return re.sub(r"\0(\d+)\0", lambda span: code[int(span[1])], result)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page, before the page is rendered."""
    root = Path(config.config_file_path).resolve().parent
    docs = Path(config.docs_dir).resolve().relative_to(root).as_posix()
    return rewrite_links(markdown, page.file.src_uri, root, docs, config.repo_url)
