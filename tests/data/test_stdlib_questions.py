"""Embedded questions: exact rules on a small made-up standard library, ranges on the real one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hfdistill.data.readers import reading_baselines, word_overlap
from hfdistill.data.stdlib_questions import (
    first_sentence,
    load_stdlib_questions,
    load_stdlib_questions_splits,
    stdlib_owners,
    words_of,
)


SOURCE = '''"""A module."""
class SimpleQueue:
    """A member of the module, not of itself."""
    def put_nowait(self):
        """Add an item
        without waiting. Never blocks.

        More.
        """
    def getSize(self):
        "Return the size"
    def __len__(self):
        """Return the number of all items."""
    def undocumented(self):
        pass
    def short(self):
        """Two words."""
    async def join(self):
        """Wait until empty, e.g. for all workers; see below:"""
    def _clear(self):
        """Remove every last item!"""
    def clear(self):
        """Remove every item, publicly."""
    def again(self):
        """ADD an item: without waiting."""
    class Empty(Exception):
        """Raised when nothing is left"""
        def few(self):
            """Only one member here."""
def one():
    """The first function of all."""
def two():
    """The second function of all."""
class Three:
    """The third thing of all."""
def four():
    """The fourth function of all."""
def five():
    """WORDS"""
'''


@pytest.fixture
def library(tmp_path):
    (tmp_path / "queue.py").write_text(SOURCE.replace("WORDS", " ".join(["word"] * 25)))
    (tmp_path / "unlisted.py").write_text(SOURCE)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("def (:")
    (tmp_path / "json" / "tool.py").write_text("\n".join(f'def name_{i}():\n    """Sentence number {i} is here."""' for i in range(20)))
    return tmp_path


def test_members_of_a_small_library(library):
    owners = {owner.name: owner for owner in stdlib_owners(library)}
    assert sorted(owners) == ["json.tool", "queue", "queue.SimpleQueue"]  # Empty has one member
    members = [(member.words, member.summary, member.is_class) for member in owners["queue.SimpleQueue"].members]
    assert members == [
        ("put nowait", "Add an item without waiting.", False),
        ("get size", "Return the size.", False),
        ("join", "Wait until empty, e.g. for all workers; see below.", False),
        ("clear", "Remove every last item!", False),  # `clear` itself would be the same words
        ("empty", "Raised when nothing is left.", True),
    ]
    assert [m.words for m in owners["queue"].members] == ["simple queue", "one", "two", "three", "four"]
    assert owners["queue.SimpleQueue"].words == "simple queue" and owners["json.tool"].words == "tool"


def test_rows_of_a_small_library(library):
    rows = {row["id"]: row for row in load_stdlib_questions(root=library)}
    row = rows["queue.SimpleQueue.put_nowait#0"]
    assert row["question"] == "What does put nowait of simple queue do?" and row["title"] == "queue.SimpleQueue"
    assert rows["queue.SimpleQueue.empty#0"]["question"] == "What is empty in simple queue?"
    contexts = {row["context"] for row in rows.values()}
    sizes = sorted(len(re.findall(r"[.!](?= |$)", context.replace("e.g. ", ""))) for context in contexts)
    assert sizes == [5, 5, 5, 5, 5, 5]
    for row in rows.values():
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text and row["context"].count(text) == 1
        assert start == 0 or row["context"][start - 2] in ".!"


def test_order_and_rounds(library):
    data = load_stdlib_questions(root=library)
    assert load_stdlib_questions(root=library).to_list() == data.to_list()
    assert load_stdlib_questions(seed=1, root=library)["context"][:] != data["context"][:]
    thrice = load_stdlib_questions(rounds=3, root=library)
    assert len(thrice) == 3 * len(data) and len(set(thrice["id"])) == len(thrice)
    assert {row["id"]: row["context"] for row in thrice if row["id"].endswith("#0")} == dict(zip(data["id"], data["context"]))
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


def test_a_sentence_that_stands_in_another_is_no_question(tmp_path):
    docs = ("Stop the run.", "Then you can Stop the run.", "Go on and on.", "Wait a little bit.", "Look at all this.")
    (tmp_path / "queue.py").write_text("\n".join(f'def f{i}():\n    """{doc}"""' for i, doc in enumerate(docs)))
    data = load_stdlib_questions(root=tmp_path)
    assert sorted(data["id"]) == [f"queue.f{i}#0" for i in (1, 2, 3, 4)] and "Stop the run." in data["context"][0]


def test_splits_of_a_small_library(library):
    splits = load_stdlib_questions_splits(2, root=library, test_size=0.1)
    titles = {name: set(split["title"]) for name, split in splits.items()}
    assert titles["few"] <= titles["teacher"]
    assert not titles["teacher"] & titles["transfer"] and not titles["test"] & (titles["teacher"] | titles["transfer"])
    assert splits["transfer"]["answers"][:] == [None] * len(splits["transfer"])
    shown = load_stdlib_questions_splits(2, root=library, test_size=0.1, hide_answers=False)
    assert shown["transfer"]["question"][:] == splits["transfer"]["question"][:] and None not in shown["transfer"]["answers"][:]
    with pytest.raises(ValueError, match=r"few=10000 answers cannot be drawn from the teacher's \d+"):
        load_stdlib_questions_splits(10000, root=library)
    with pytest.raises(ValueError, match="No documentation of the standard library"):
        load_stdlib_questions(root=library / "nowhere")


def test_the_real_library():
    splits = load_stdlib_questions_splits(rounds=2)
    sizes = {name: len(split) for name, split in splits.items()}
    assert len({name.rpartition("#")[0] for name in splits["few"]["id"]}) == 300 and 590 < sizes["few"] <= 600  # both contexts of each
    assert 2500 < sizes["teacher"] < 4500 and 2500 < sizes["transfer"] < 4500 and 600 < sizes["test"] < 1100
    sentences = {name: set(re.split(r"(?<=[.!?]) ", " ".join(split["context"]))) for name, split in splits.items()}
    assert len(sentences["test"] & (sentences["teacher"] | sentences["transfer"])) < 20  # pieces of cut sentences such as "etc."
    answers = {name: {a["text"][0] for a in splits[name]["answers"]} for name in ("teacher", "few", "test")}
    assert not answers["teacher"] & answers["test"] and answers["few"] <= answers["teacher"]
    right = [word_overlap(row["question"], row["context"]) == row["answers"]["text"][0] for row in splits["test"]]
    assert 0.4 < sum(right) / len(right) < 0.65  # what counting words answers
    first = [row["answers"]["answer_start"][0] == 0 for row in splits["test"]]
    assert 0.14 < sum(first) / len(first) < 0.27  # the order tells nothing


@pytest.mark.parametrize(
    ("name", "words"), [("A", "a"), ("parseXMLFile", "parse xml file"), ("__", ""), ("utf8_mode", "utf8 mode")]
)
def test_names_in_words(name, words):
    assert words_of(name) == words


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("see x.y and e.g. this", "see x.y and e.g. this."),
        ("Ends with colon:\n\n  code", "Ends with colon."),
        ("Is it? Yes.", "Is it?"),
        ("", ""),
        ("Title\n=====\nText", "Title Text."),
    ],
)
def test_first_sentences(text, sentence):
    assert first_sentence(text) == sentence


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
