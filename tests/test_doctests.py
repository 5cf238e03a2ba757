"""The examples in the docstrings of hfdistill run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import hfdistill


ROOT = Path(hfdistill.__file__).parent
FILES = sorted(path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py") if path.stem != "__init__")
MODULES = [".".join(("hfdistill", *file.parts)) for file in FILES]


class FencedParser(doctest.DocTestParser):
    """Takes a closing code fence for the end of the expected output, as the Hugging Face documentation does."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^\s*```\w*$", "", string, flags=re.MULTILINE), name)


def run_examples(name: str) -> doctest.TestResults:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=FencedParser()).find(importlib.import_module(name)):
        runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = run_examples(name)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail; see the captured output"


def test_examples_are_found():
    assert len(MODULES) >= 20
    assert run_examples("hfdistill.schedules").attempted == 6 and run_examples("hfdistill.cli").attempted == 4
