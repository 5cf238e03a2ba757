"""Embedded questions: exact rules on a small made-up standard library, ranges on the real one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hfdistill.data.readers import reading_baselines, word_overlap
from hfdistill.data.stdlib_questions import (
    answers_in,
    load_stdlib_questions,
    load_stdlib_questions_splits,
    sentences_in,
    words_of,
)


SOURCE = '''"""A module. It returns nothing. It is no question."""
class SimpleQueue:
    """Holds the items. Items wait
    in order. Too short.

    Raises Full when there is no room.  The size is 10 by default.
    """
    def put_nowait(self):
        """Add an item to the end of NUMBER. Never blocks the caller at all.

        If there is no room, nothing is added. When closed, it fails.
        """
    def getSize(self):
        """Return the size of it. It is a number. Returns at once."""
    def __len__(self):
        """Return the number of items. It is a number. If empty, it is zero."""
    def room(self):
        """Return the room that is left. It is a number."""
    def room(self, more):
        """Change the room that is left. Returns the new one."""
    def undocumented(self):
        def inner():
            """Does the inner work. Nothing else is done. What was found is returned."""
def again():
    """holds the items! Items wait in order. Raises Full when there is no room. The size is 10 by default."""
def long():
    """Do a lot of things. If asked, WORDS."""
def part():
    """Return the sum. Return the sum. If so. It was long ago."""
'''


@pytest.fixture
def library(tmp_path):
    (tmp_path / "queue.py").write_text(SOURCE.replace("WORDS", " ".join(["word"] * 100)))
    (tmp_path / "unlisted.py").write_text(SOURCE)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("def (:")
    for module in ("ast", "json/tool", "os", "re"):
        text = "Do the work number {0} of {1}. Nothing else is done here. Return what number {0} of {1} found."
        functions = "\n".join(f'def name_{i}():\n    """{text.format(i, module)}"""' for i in range(6))
        (tmp_path / f"{module}.py").write_text(functions)
    return tmp_path


def test_questions_of_a_small_library(library):
    rows = {row["id"]: row for row in load_stdlib_questions(library) if row["title"] == "queue"}
    assert {name: (row["question"], *row["answers"]["text"]) for name, row in rows.items()} == {
        "queue.SimpleQueue.error": ("When does simple queue raise an error?", "Raises Full when there is no room."),
        "queue.SimpleQueue.default": ("What is the default of simple queue?", "The size is 10 by default."),
        "queue.SimpleQueue.room.return": ("What does room return?", "Returns the new one."),  # defined twice
        "queue.SimpleQueue.undocumented.inner.return": ("What does inner return?", "What was found is returned."),
    }  # two conditions of put_nowait, two results of getSize, a dunder, a repetition, a long one, a sentence that stands twice
    assert rows["queue.SimpleQueue.error"]["context"] == (
        "Holds the items. Items wait in order. Raises Full when there is no room. The size is 10 by default."
    )
    for row in load_stdlib_questions(library):
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text and row["context"].count(text) == 1


def test_a_kind_with_two_answers_is_not_asked_for():
    sentences = ["Add an item.", "If full, fail.", "When closed, fail.", "Return it all."]
    assert answers_in(sentences) == {"return": "Return it all."}
    assert answers_in(sentences[:3]) == {}
    assert answers_in(["If so, return x, else raise y.", "The result is returned."]) == {
        "case": "If so, return x, else raise y.",
        "error": "If so, return x, else raise y.",
        "return": "The result is returned.",
    }


def test_the_same_rows_in_every_process(library):
    code = f"""
from hfdistill.data.stdlib_questions import load_stdlib_questions_splits
splits = load_stdlib_questions_splits(2, root={str(library)!r})
print([splits[name]["context"][:] for name in splits], splits["few"]["id"][:])
"""
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": str(n)}).stdout
        for n in (1, 2)
    }
    assert len(outputs) == 1


def test_splits_of_a_small_library(library):
    splits = load_stdlib_questions_splits(2, root=library, test_size=0.1)
    titles = {name: set(split["title"]) for name, split in splits.items()}
    assert titles["few"] <= titles["teacher"] and set(splits["few"]["id"]) <= set(splits["teacher"]["id"]) and len(splits["few"]) == 2
    assert not titles["teacher"] & titles["transfer"] and not titles["test"] & (titles["teacher"] | titles["transfer"])
    assert splits["transfer"]["answers"][:] == [None] * len(splits["transfer"])
    shown = load_stdlib_questions_splits(2, root=library, test_size=0.1, hide_answers=False)
    assert shown["transfer"]["question"][:] == splits["transfer"]["question"][:] and None not in shown["transfer"]["answers"][:]
    other = load_stdlib_questions_splits(2, seed=1, root=library, test_size=0.1)
    assert other["test"]["id"][:] != splits["test"]["id"][:]
    with pytest.raises(ValueError, match=r"few=10000 answers cannot be drawn from the teacher's \d+"):
        load_stdlib_questions_splits(10000, root=library)
    with pytest.raises(ValueError, match="No documentation of the standard library"):
        load_stdlib_questions(root=library / "nowhere")


def test_the_real_library():
    splits = load_stdlib_questions_splits()
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes["few"] == 100
    assert 400 < sizes["teacher"] < 1200 and 400 < sizes["transfer"] < 1200 and 200 < sizes["test"] < 600
    contexts = {name: set(split["context"]) for name, split in splits.items()}
    assert not contexts["test"] & (contexts["teacher"] | contexts["transfer"]) and not contexts["teacher"] & contexts["transfer"]
    names = [name for split in ("teacher", "transfer", "test") for name in splits[split]["id"]]
    assert len(set(names)) == len(names)
    readers = reading_baselines(splits["test"])
    truth = [answers["text"][0] for answers in splits["test"]["answers"]]
    first = sum(answer["prediction_text"] == own for answer, own in zip(readers["first_sentence"], truth)) / len(truth)
    assert 0.1 < first < 0.4  # most first sentences say what a thing does, which nobody asks


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "First line is here\nand goes on. Two words.\n\nA list:\n - x is one\n",
            ["First line is here and goes on.", "A list: - x is one"],
        ),
        (
            "It is (see\nbelow) e.g. like this one. `code` follows here now.",
            ["It is (see below) e.g. like this one.", "`code` follows here now."],
        ),
        (" ".join(["word"] * 31), []),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert sentences_in(text) == sentences


@pytest.mark.parametrize(
    ("name", "words"), [("A", "a"), ("parseXMLFile", "parse xml file"), ("__", ""), ("utf8_mode", "utf8 mode"), ("_a__b2", "a b2")]
)
def test_names_in_words(name, words):
    assert words_of(name) == words


def test_word_overlap():
    context = "Close the file. Return the positions of the reader. Return nothing."
    assert word_overlap("What does reader position of buffer do?", context) == "Return the positions of the reader."
    assert word_overlap("What does nothing match?", "Some text. Nothing here.") == "Nothing here."
    assert word_overlap("What is zzz in yyy?", context) == "Close the file."


def test_reading_baselines():
    rows = {"id": ["x", "y"], "question": ["What jumps?", "What is it?"], "context": ["It is. Who jumps? All do.", "No end"]}
    baselines = reading_baselines(rows)
    texts = {name: [answer["prediction_text"] for answer in answers] for name, answers in baselines.items()}
    assert texts == {"word_overlap": ["Who jumps?", "No end"], "first_sentence": ["It is.", "No end"]}
    assert [answer["id"] for answer in baselines["word_overlap"]] == ["x", "y"]
