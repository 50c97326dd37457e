"""The documentation as a whole: its navigation, its links, and the built site."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adamaxw.keras

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_PAGES = sorted(_DOCS.rglob("*.md"))


def _prose(path):
    """The text of a page without its code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda code: code[0].replace("](", ""), text)


def _anchors(path):
    """The anchors of the headings of a page, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", _prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", x).strip().lower().replace(" ", "-") for x in headings}


def _public_names():
    """The path of each public name, module by module."""
    for name in [*adamaxw.__all__, "keras"]:
        yield f"adamaxw.{name}"
        if isinstance(module := getattr(adamaxw, name), ModuleType):
            own = {x: getattr(y, "__module__", None) for x, y in vars(module).items()}
            public = [x for x in own if own[x] == module.__name__ and not x.startswith("_")]
            yield from (f"adamaxw.{name}.{x}" for x in getattr(module, "__all__", public))


def test_every_page_is_in_the_navigation_once():
    text = (_ROOT / "mkdocs.yml").read_text("utf-8")
    navigation = re.findall(r"^ +- .+: (\S+\.md)$", text, re.M)
    assert sorted(navigation) == sorted(str(page.relative_to(_DOCS)) for page in _PAGES)


@pytest.mark.parametrize("path", [*_ROOT.glob("*.md"), *_PAGES], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every relative link names a file that is there, and a heading that it has."""
    broken = []
    text = _prose(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        found = (path.parent / file).resolve() if file else path
        if not found.is_file() or (anchor and anchor not in _anchors(found)):
            broken.append(target)
    assert not broken


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning is an error."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="needs the extra `docs`")
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


def test_site_documents_every_public_name_and_loads_nothing_from_elsewhere(site):
    """No script, style, font or image of another host: the site works without a network."""
    entries = re.findall(r'id="(adamaxw[\w.]*)"', (site / "api.html").read_text(encoding="utf-8"))
    assert set(_public_names()) <= set(entries)
    tags, url = "script|link|img|iframe|source", r"((?:https?:)?//[^\"'> ]+)"
    loads = rf"<(?:{tags})\b[^>]*?\b(?:src|href)=[\"']?{url}"
    imports = r"(?:url\([\"']?|@import\s+[\"'])((?:https?:)?//[^\"')]+)"
    found = [
        target
        for path in site.rglob("*")
        for pattern in {".html": [loads, imports], ".css": [imports]}.get(path.suffix, [])
        for target in re.findall(pattern, path.read_text(encoding="utf-8"))
    ]
    assert not found
