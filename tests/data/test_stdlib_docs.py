"""docs6: exact rules on a small made-up standard library, ranges on the real one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from datasets import concatenate_datasets

from hfdistill.data import (
    AREA_NAMES,
    STDLIB_AREAS,
    label_counts,
    load_stdlib_docs,
    load_stdlib_docs_splits,
    load_topics_paragraphs,
    stdlib_docs_fingerprint,
)
from hfdistill.data import stdlib_docs as module_under_test


EIGHT = "one two three four five six seven eight"


def write(root, path, *docs, kind="def {}():"):
    """A source file: the first text documents the file, the others one function (or class) each."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    body = [f'"""{docs[0]}"""'] if docs and docs[0] else []
    for i, doc in enumerate(docs[1:]):
        body.append(f'{kind.format(f"f{i}")}\n    """{doc}"""')
    target.write_text("\n".join(body) + "\n", encoding="utf-8")


def test_rules_on_a_small_library(tmp_path):
    write(tmp_path, "json/__init__.py", "JSON and json: jsonify stays, the json of a b c")
    write(tmp_path, "json/tool.py", "seven words are not enough at all", EIGHT + " (json)", kind="class {}:")
    write(tmp_path, "_pyio.py", "pyio reads\n\n    ======\n    and   writes, so does _pyio ~~~~~ --- each time")
    write(tmp_path, "ast.py", None, "Two lines\n    of\ttext with more than eight words altogether", kind="async def {}():")
    write(tmp_path, "zlib_unlisted.py", EIGHT + " nine")
    for folder in ("site-packages", "test", "config-3.11-x", "email/test", "idlelib", "__pycache__"):
        write(tmp_path, f"{folder}/json.py", EIGHT + " hidden in " + folder)
    write(tmp_path, "email/message.py", "ONE, two: three four five six seven eight (JSON)!")  # later duplicate, other area
    (tmp_path / "email" / "broken.py").write_text('"""' + EIGHT + ' broken"""\ndef (:\n')
    (tmp_path / "email" / "latin.py").write_bytes(b'"""caf\xe9 in latin one: ' + EIGHT.encode() + b'"""\n')
    (tmp_path / "email" / "notes.txt").write_text(EIGHT)

    data = load_stdlib_docs(tmp_path)

    # Files of a folder come before its subfolders, both sorted.
    # Masking comes before the comparison, so "(json)" and "(JSON)" are two texts in two areas.
    assert list(zip(data["module"], data["text"], strict=True)) == [
        ("_pyio", "module reads and writes, so does _pyio --- each time"),
        ("ast", "Two lines of text with more than eight words altogether"),
        ("email", "caf� in latin one: " + EIGHT),
        ("email", "ONE, two: three four five six seven eight (JSON)!"),
        ("json", "module and module: jsonify stays, the module of a b c"),
        ("json", EIGHT + " (module)"),
    ]
    assert [data.features["label"].int2str(label) for label in data["label"]] == [
        "files and processes",
        "language tools",
        "network",
        "network",
        "data formats",
        "data formats",
    ]
    unmasked = load_stdlib_docs(tmp_path, mask_module=False)
    assert unmasked["text"][0].startswith("pyio reads") and EIGHT + " (json)" not in unmasked["text"][:]  # now it is a duplicate


def test_documentation_of_every_kind_in_order_of_depth(tmp_path):
    (tmp_path / "queue.py").write_text(
        f'class A:\n    """class {EIGHT}"""\n    async def m(self):\n        """method {EIGHT}"""\n'
        f'def f():\n    """function {EIGHT}"""\n    "not documentation {EIGHT}"\n'
    )
    assert [text.split()[0] for text in load_stdlib_docs(tmp_path)["text"]] == ["class", "function", "method"]


def test_no_sources_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"No documentation of the standard library in .*its \.py sources are not there"):
        load_stdlib_docs(tmp_path)


def test_fingerprint_sees_texts_labels_and_order(tmp_path):
    write(tmp_path, "json.py", EIGHT, "other " + EIGHT)
    data = load_stdlib_docs(tmp_path)
    lines = "".join(json.dumps([text, 1]) + "\n" for text in data["text"])
    assert stdlib_docs_fingerprint(data) == hashlib.sha256(lines.encode()).hexdigest()
    assert stdlib_docs_fingerprint(data.select([1, 0])) != stdlib_docs_fingerprint(data)
    assert stdlib_docs_fingerprint(data.remove_columns("label").add_column("label", [1, 2])) != stdlib_docs_fingerprint(data)


@pytest.fixture(scope="module")
def small_library(tmp_path_factory):
    """60, 50, 40, 30, 20 and 20 texts in the six areas."""
    root = tmp_path_factory.mktemp("library")
    for area, rows in zip(AREA_NAMES, (60, 50, 40, 30, 20, 20), strict=True):
        write(root, f"{STDLIB_AREAS[area].split()[0]}.py", None, *(f"{area} number {i} {EIGHT}" for i in range(rows)))
    return root


def test_splits(small_library):
    everything = load_stdlib_docs(small_library)
    splits = load_stdlib_docs_splits(few=22, root=small_library)
    texts = {name: splits[name]["text"][:] for name in splits}
    label_of = dict(zip(everything["text"], everything["label"], strict=True))

    assert {name: len(rows) for name, rows in texts.items()} == {"teacher": 88, "few": 22, "transfer": 88, "test": 44}
    assert set(texts["few"]) < set(texts["teacher"])
    assert sorted(texts["teacher"] + texts["transfer"] + texts["test"]) == sorted(everything["text"])
    for name in splits:  # stratified: shares of the whole, to within a row and a half
        for label, rows in enumerate((60, 50, 40, 30, 20, 20)):
            assert abs(sum(label_of[text] == label for text in texts[name]) - rows * len(texts[name]) / 220) < 1.5
    for name in ("teacher", "few", "test"):
        assert splits[name]["label"][:] == [label_of[text] for text in texts[name]]
    assert set(splits["transfer"]["label"]) == {-100}
    assert splits["transfer"]["module"][:] == [everything["module"][everything["text"][:].index(text)] for text in texts["transfer"]]
    assert {name: splits[name].features for name in splits} == dict.fromkeys(splits, everything.features)

    shown = load_stdlib_docs_splits(few=22, root=small_library, hide_labels=False)["transfer"]
    assert shown["text"][:] == texts["transfer"] and shown["label"][:] == [label_of[text] for text in texts["transfer"]]
    joined = concatenate_datasets([splits["few"], splits["transfer"]]).map(lambda rows: {"n": [len(t) for t in rows["text"]]}, batched=True)
    assert joined["label"][:] == splits["few"]["label"][:] + [-100] * 88
    assert joined.with_format("torch")[30]["label"] == -100


def test_splits_repeat_and_follow_the_seed(small_library):
    first, again, other = (load_stdlib_docs_splits(few=22, seed=seed, root=small_library) for seed in (0, 0, 1))
    for name in first:
        assert first[name]["text"][:] == again[name]["text"][:]
        assert first[name]["text"][:] != other[name]["text"][:]


@pytest.mark.parametrize("few", [5, 83])
def test_impossible_few(small_library, few):
    with pytest.raises(ValueError, match=rf"few={few} labelled rows cannot be drawn from the teacher's 88 .* between 6 and 82"):
        load_stdlib_docs_splits(few=few, root=small_library)


def test_paragraphs_of_the_language_reference():
    ten = "one two three four five six seven eight nine ten"
    topics = {
        "b": f"{ten}\n\nonly nine words of text are in this one\n   \n  {ten}  B",
        "a": f"one two three\n  four five six seven   eight nine ten\n\n\n{ten} A",
    }
    assert module_under_test.topic_paragraphs(topics) == [ten, f"{ten} A", f"{ten} B"]
    real = load_topics_paragraphs()
    assert 1_000 < len(real) < 2_500 and len(set(real)) == len(real) and min(len(text.split()) for text in real) >= 10


def test_missing_language_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="no pydoc_data.topics"):
        load_topics_paragraphs()


@pytest.fixture(scope="module")
def real():
    return load_stdlib_docs()


def test_the_real_library_is_large_and_mixed(real):
    """Figures of five interpreters lie between 4,301 and 4,512 rows; shares move by less than a point."""
    assert 4_000 < len(real) < 5_500
    shares = [count / len(real) for count in label_counts(real).values()]
    assert shares == pytest.approx([0.122, 0.118, 0.148, 0.238, 0.217, 0.157], abs=0.03)
    assert set(real["module"]) <= {module for modules in STDLIB_AREAS.values() for module in modules.split()}


def test_the_default_cut_of_the_real_library(real, monkeypatch):
    monkeypatch.setattr(module_under_test, "load_stdlib_docs", lambda root: real)
    splits = load_stdlib_docs_splits()
    assert len(splits["few"]) == 300
    assert len(splits["test"]) == pytest.approx(0.2 * len(real), abs=1)
    assert 0 <= len(splits["transfer"]) - len(splits["teacher"]) <= 1
    assert list(label_counts(splits["few"]).values()) == pytest.approx([37, 35, 44, 72, 65, 47], abs=4)


def test_module_table():
    modules = [module for modules in STDLIB_AREAS.values() for module in modules.split()]
    assert len(modules) == len(set(modules)) == 143
    assert AREA_NAMES == ("concurrency", "data formats", "files and processes", "language tools", "network", "numbers and containers")


def test_importing_the_package_is_light():
    code = "import sys, hfdistill.data; print(sorted({'torch', 'datasets', 'transformers', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
