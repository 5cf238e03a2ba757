#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill"]
# ///
"""Writes one page for each loss, from its docstring, its constructor and its papers.

    python scripts/write_loss_pages.py docs/losses

A test compares the pages with what this would write.
"""

import inspect
import re
import sys
from pathlib import Path

import hfdistill


def options_of(loss) -> str:
    """The constructor's arguments with their defaults, as a term in YAML takes them."""
    parameters = [p for p in inspect.signature(loss.__init__).parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    return ", ".join(f"`{p.name}: {p.default!r}`" for p in parameters) or "none"


def page(name, loss) -> str:
    """One Markdown page."""
    text = inspect.cleandoc(loss.__doc__)
    text = re.sub(r"(?m)^(Args|Shapes|Raises|Example|Examples):$", r"## \1\n", text)
    text = re.sub(r"\[`(\w+)`\]", r"`\1`", text)
    text = re.sub(r"(?m)^    (\w+)( \(.*?\))?:", r"* `\1`\2:", text)  # entries of the lists
    text = re.sub(r"(?m)^    (student|teacher)(, \w+)*:", lambda found: "* " + found[0].strip(), text)
    signals = loss.signals or (loss.signal,)
    rows = [
        f"# `{name}`: {loss.__name__}",
        f"In YAML: `- {{loss: {name}, weight: 1.0}}`. Compares `{loss.signal}`"
        + (f" (can: {', '.join(f'`{signal}`' for signal in signals)})" if len(signals) > 1 else "")
        + f". Options: {options_of(loss)}.",
        text,
    ]
    papers = hfdistill.citations_for([name])
    if papers:
        rows.append("## Citation\n\n" + "\n\n".join(f"```bibtex\n{entry}\n```" for entry in papers))
    return "\n\n".join(rows) + "\n"


def pages() -> dict[str, str]:
    """File name -> contents, the list of all losses among them."""
    found = {f"{name}.md": page(name, loss) for name, loss in hfdistill.LOSSES.items()}
    lines = [
        "# Losses",
        "",
        "Made by `python scripts/write_loss_pages.py docs/losses`.",
        "",
        "| name | compares | what |",
        "| :--- | :--- | :--- |",
    ]
    for name, loss in sorted(hfdistill.LOSSES.items()):
        first = re.sub(r"\[`(\w+)`\]", r"`\1`", inspect.cleandoc(loss.__doc__).split("\n\n")[0].replace("\n", " ")).replace("|", "\\|")
        lines.append(f"| [`{name}`]({name}.md) | {loss.signal} | {first} |")
    return {**found, "README.md": "\n".join(lines) + "\n"}


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/losses")
