"""The page of each loss is made from its docstring, and is what the script would write today."""

from __future__ import annotations

from recipes_under_test import ROOT
from test_house import load_program

import hfdistill


def test_pages_are_up_to_date():
    script = load_program(ROOT / "scripts/write_loss_pages.py")
    written = script.pages()
    folder = ROOT / "docs/losses"
    assert {path.name for path in folder.glob("*.md")} == set(written)
    old = [name for name, text in written.items() if (folder / name).read_text(encoding="utf-8") != text]
    assert not old, f"{old} differ: run python scripts/write_loss_pages.py docs/losses"


def test_every_loss_has_a_page_with_its_paper():
    for name, loss in hfdistill.LOSSES.items():
        text = (ROOT / f"docs/losses/{name}.md").read_text(encoding="utf-8")
        assert f"`{name}`: {loss.__name__}" in text and "## Shapes" in text
        assert ("```bibtex" in text) == bool(hfdistill.citations_for([name]))
