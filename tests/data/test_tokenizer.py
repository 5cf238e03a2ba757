"""The tokenizer: the same in every process, greedy longest match, loadable by AutoTokenizer."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import unicodedata

import pytest
from transformers import AutoTokenizer

from hfdistill.data import train_wordpiece, vocabulary_fingerprint


TRAIN = """
import random, sys
from hfdistill.data import train_wordpiece, vocabulary_fingerprint
print(vocabulary_fingerprint(train_wordpiece(eval(sys.stdin.read()), vocab_size=150)))
"""


def corpus(words: int = 400) -> list[str]:
    """Many words of equal frequency: ties between merges are where training used to differ from run to run."""
    rng = random.Random(0)
    made = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 9))) for _ in range(words)]
    return [" ".join(made[i : i + 8]) for i in range(0, words, 8)] + ["Café, f(x) = ab; NOT abc."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(corpus(), vocab_size=150)


def test_trainings_agree_within_and_across_processes(tokenizer):
    """The hash maps of the library are seeded anew for every map and every process."""
    expected = vocabulary_fingerprint(tokenizer)
    for _ in range(5):
        assert vocabulary_fingerprint(train_wordpiece(corpus(), vocab_size=150)) == expected
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN],
            input=repr(corpus()),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_vocabulary(tokenizer):
    vocab = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocab) == 150 and sorted(vocab.values()) == list(range(150))
    assert [vocab[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0 and tokenizer.mask_token_id == 4
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert set(tokenizer.get_added_vocab()) == set(tokenizer.all_special_tokens)
    words = re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFD", " ".join(corpus()).lower()).replace("\u0301", ""))
    for token in set(vocab) - set(tokenizer.all_special_tokens):
        piece = token.removeprefix("##")
        assert any(word.find(piece, 1 if token != piece else 0) >= 0 for word in words), token


def test_greedy_longest_match(tokenizer):
    vocab = set(tokenizer.get_vocab())

    def reference(word):
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in vocab:
                    break
            else:
                return ["[UNK]"]
            pieces.append(piece)
            start = end
        return pieces

    rng = random.Random(1)
    for word in ["".join(rng.choice("abcdefghijz") for _ in range(rng.randint(1, 12))) for _ in range(200)]:
        assert tokenizer.tokenize(word) == reference(word)
    assert tokenizer.tokenize("CAFÉ") == reference("cafe")
    encoded = tokenizer("ab", "cd")
    assert encoded["token_type_ids"] == [0] * (len(tokenizer.tokenize("ab")) + 2) + [1] * (len(tokenizer.tokenize("cd")) + 1)
    assert encoded["input_ids"][0] == 2 and encoded["input_ids"][-1] == 3


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.model_max_length == 512
    assert vocabulary_fingerprint(loaded) == vocabulary_fingerprint(tokenizer)
    assert loaded(corpus())["input_ids"] == tokenizer(corpus())["input_ids"]


def test_case_is_kept_on_request():
    kept = train_wordpiece(corpus(), vocab_size=150, lowercase=False)
    assert "N" in kept.get_vocab() and kept.tokenize("N") == ["N"]


def test_fingerprint_sees_the_ids(tokenizer):
    assert vocabulary_fingerprint(train_wordpiece(corpus(), vocab_size=149)) != vocabulary_fingerprint(tokenizer)


def test_no_text_and_too_small():
    with pytest.raises(ValueError, match="every document is empty"):
        train_wordpiece(["", "  "])
    with pytest.raises(ValueError, match=r"vocab_size=7 is too small: 5 special tokens and 4 single-character pieces .* at least 9"):
        train_wordpiece(["aba"], vocab_size=7)
