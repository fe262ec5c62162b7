"""Pages and settings for contributors: the table of fidelity is whole, and hooks use this environment's tools."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_difference_from_the_releases_has_a_row_with_a_state() -> None:
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]\d) \| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE)
    counts = {"X": 9, "V": 8, "B": 9, "A": 9, "L": 6, "C": 6}
    assert [name for name, _, _ in rows] == [f"{part}{i}" for part, n in counts.items() for i in range(1, n + 1)]
    for name, _, state in rows:
        assert re.match(r"(as released|option `|ours: |open)", state), f"{name}: {state}"


def test_hooks_are_local_and_download_nothing() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: *(\S+)", text) == ["local"]
    assert set(re.findall(r"language: *(\S+)", text)) == {"system"}
    entries = re.findall(r"entry: *(.+)", text)
    assert [entry.split()[0] for entry in entries] == ["ruff", "ruff", "mypy"]


def test_the_readme_leads_to_the_pages_for_contributors_and_the_glossary() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ("CONTRIBUTING.md", "SECURITY.md", "docs/glossary.md", "docs/fidelity.md"):
        assert f"]({page})" in text
    assert "(fidelity.md)" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    families = (ROOT / "docs" / "results" / "demo.md").read_text(encoding="utf-8").partition("What each family asks")[2]
    for family in ("compare", "count", "existence", "nearest", "negation", "odd", "relation query", "same", "verify"):
        assert f"| {family} |" in families, family
