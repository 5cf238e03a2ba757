"""What leaves the machine: the same text without folders, user names and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdistill.redaction import shareable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ana/runs/first", "first"),
        ("/home/ana/runs/first/", "first"),
        ("/home/ana/my runs/the first", "the first"),
        ("~/runs/first", "first"),
        (r"C:\Users\ana\runs\first", "first"),
        ("C:/Users/ana/first", "first"),
        ("file:///home/ana/first.csv", "first.csv"),
        ("/home/ana", "~"),
        ("/Users/ana/", "~"),
        (r"train C:\Users\ana now", "train ~ now"),
        ("run x.py --output_dir=/home/ana/out --data '/home/ana/my data/a.csv' --n 3", "run x.py --output_dir=out --data 'a.csv' --n 3"),
        ("/opt/venv/bin/accelerate launch /home/ana/x.py --a b", "accelerate launch x.py --a b"),
        ("from (/srv/data/a.csv), then /srv/b", "from (a.csv), then b"),
        ("PYTHONPATH=/home/ana/a:/home/ana/b", "PYTHONPATH=a:b"),
        ("first line\n/home/ana/second", "first line\nsecond"),
    ],
)
def test_absolute_paths_are_cut(text, expected):
    assert shareable(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "org/teacher",
        "recipes/configs/a.yaml",
        "./out/model",
        "../data/train.csv",
        "https://huggingface.co/papers/1503.02531",
        "and/or",
        "3 / 4",
        "1/2",
        "<b>x</b>",
        "T² · KL(t || s)",
        "12:30",
        "| 0 | 1:3 |",
        "",
        "a\\b",
        "key: value",
        "--tokenizer_name org/tok --token_weight 3",
    ],
)
def test_everything_else_stays(text):
    assert shareable(text) == text


@pytest.mark.parametrize(
    "text",
    ["x.py --hub_token SECRET1 --lr 1", "x.py --token=SECRET1", "uses hf_SECRET1abcdefghijkl here", "HF_TOKEN=hf_SECRET1abcdefghijkl"],
)
def test_tokens_are_hidden(text):
    assert "SECRET1" not in shareable(text) and "<hidden>" in shareable(text)


def test_any_depth_and_other_types():
    value = {"a": [Path("/home/ana/x"), ("/home/ana/y", 1.5)], "/home/ana/z": {"b": None}, "c": True}
    assert shareable(value) == {"a": ["x", ("y", 1.5)], "z": {"b": None}, "c": True}
