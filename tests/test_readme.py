"""README and docs/ point at what is there, and dql.py keeps to what they promise of it."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_names_the_lines_of_dql():
    lines = (ROOT / "dql.py").read_text().splitlines()
    links = re.findall(r"\[`([\w.]+)`\]\(dql\.py#L(\d+)\)", PAGES[0].read_text())
    assert len(links) >= 8
    for name, number in links:
        defined = rf"\s*(class |def )?{name.split('.')[-1]}\b"
        assert re.match(defined, lines[int(number) - 1]), f"{name} is not in line {number}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


def test_dql_is_short_enough_to_read():
    lines = (ROOT / "dql.py").read_text().splitlines()
    assert len(lines) <= 500 and max(map(len, lines)) <= 100
