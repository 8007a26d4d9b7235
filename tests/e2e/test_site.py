"""The documentation site builds without warnings, its links exist, and the API pages contain the public names."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

import myllm_ray

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The links and anchors of an HTML file."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")


def pages_of(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.resolve().rglob("*.html"))}


def broken_links(site: Path) -> list[str]:
    """Returns `page: link` for each link to a file or an anchor that the site does not contain."""
    site, pages, broken = site.resolve(), pages_of(site), []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:  # 404.html links from the root of the server, because it is shown at any address
                start = site if parts.path.startswith("/") else path.parent
                target = (start / unquote(parts.path).lstrip("/")).resolve()
            if target.is_dir():
                target /= "index.html"
            found = target.is_file() and target.is_relative_to(site)
            if not found or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the site, built as `make docs` builds it."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; `make docs` installs it")
    folder = tmp_path_factory.mktemp("docs") / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_links_and_anchors_exist(site: Path) -> None:
    pages = pages_of(site)
    assert len(pages) > 20
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert broken_links(site) == []


def test_every_page_is_in_the_site(site: Path) -> None:
    docs = ROOT / "docs"
    for page in sorted(docs.rglob("*.md")):
        assert (site / page.relative_to(docs).with_suffix(".html")).is_file(), page


def test_the_api_pages_contain_the_public_names(site: Path) -> None:
    anchors = set().union(*(page.anchors for path, page in pages_of(site).items() if path.parent.name == "api"))
    made = {name for name in myllm_ray._PUBLIC if name.endswith(("_loop", "Config"))} - {"TrainerConfig"}
    """Names that are generated at run time. The API pages describe what generates them."""
    expected = {f"{module}.{name}" for name, module in myllm_ray._PUBLIC.items() if name not in made}
    assert sorted(expected - anchors) == []


def test_the_check_detects_broken_links(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="#top"></a><a href="sub/">to a folder</a><a href="sub/index.html#there"></a>'
        '<a href="https://example.org/none#x"></a><a href="#none"></a><img src="none.svg"><a href="sub/#none"></a>'
    )
    (tmp_path / "sub" / "index.html").write_text('<p id="there"><a href="../index.html"></a><a href="/index.html">')
    assert broken_links(tmp_path) == ["index.html: #none", "index.html: none.svg", "index.html: sub/#none"]


@pytest.mark.parametrize(
    ("markdown", "without", "with_url"),
    [
        ("[the README](../README.md)", "the README", "[the README](https://example.org/r/blob/HEAD/README.md)"),
        ("[`x`](../README.md#train)", "`x`", "[`x`](https://example.org/r/blob/HEAD/README.md#train)"),
        ("[a](../examples), b", "a, b", "[a](https://example.org/r/tree/HEAD/examples), b"),
        ("[a](data.md#chats) [b](#c) ![d](learning.svg)", None, None),
        ("[a](../no/such/file.md)", None, None),
        ("`[a](../README.md)`", None, None),
        ("```\n[a](../README.md)\n```\n", None, None),
    ],
)
def test_links_out_of_the_docs_folder(markdown: str, without: str | None, with_url: str | None) -> None:
    spec = importlib.util.spec_from_file_location("docs_hook", ROOT / "tools" / "docs_hook.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.rewrite_links(markdown, "page.md", ROOT, "docs", None) == (without or markdown)
    assert hook.rewrite_links(markdown, "page.md", ROOT, "docs", "https://example.org/r/") == (with_url or markdown)
    # A page in a folder of docs/: `../` leads to docs/ itself.
    assert hook.rewrite_links("[a](../data.md)", "api/page.md", ROOT, "docs", None) == "[a](../data.md)"
