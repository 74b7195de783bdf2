"""The pages of the project lead where they say, and name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
INDEX = ROOT / "docs" / "architecture.md"

LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]+))?\)")
FOLDERS_OF_CODE = (ROOT, ROOT / "src" / "kvloom", ROOT / "docs")
NAMED_PATH = re.compile(r"`([a-z][\w.]*/[\w./]*)`")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), f"{_name(page)} links to {target}, which does not exist"
        assert not anchor or anchor in _anchors(file), f"{_name(page)} links to {target}#{anchor}: no such heading"


@pytest.mark.parametrize("page", [INDEX, *sorted(INDEX.with_suffix("").glob("*.md"))], ids=_name)
def test_every_file_and_folder_that_the_architecture_names_exists(page: Path) -> None:
    for named in NAMED_PATH.findall(page.read_text(encoding="utf-8")):
        paths = [folder / own for folder in FOLDERS_OF_CODE for own in (named, f"{named}.py")]
        assert any(path.exists() for path in paths), f"{_name(page)} names `{named}`, which does not exist"


def test_the_index_of_the_architecture_has_every_page() -> None:
    linked = {target for target, _ in LINK.findall(INDEX.read_text(encoding="utf-8"))}
    assert {f"architecture/{page.name}" for page in INDEX.with_suffix("").glob("*.md")} <= linked
