"""A small WordPiece tokenizer trained from text, the same one every time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import BertTokenizer, PreTrainedTokenizerBase


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 300


def train_wordpiece(texts: Iterable[str], vocab_size: int = 3000, lowercase: bool = True, max_length: int = 512) -> BertTokenizer:
    """Train a BERT tokenizer on `texts`; the same texts give the same vocabulary and the same ids in every process.

    Args:
        texts (iterable of `str`): the text to learn from; never the test part.
        vocab_size (`int`, defaults to 3000): pieces, the five special tokens included.
        lowercase (`bool`, defaults to `True`): lower-case and strip accents, as `bert-base-uncased` does.
        max_length (`int`, defaults to 512): the tokenizer's `model_max_length`.

    Returns:
        `BertTokenizer`: save it with `save_pretrained`; `AutoTokenizer` loads it. `[PAD]` is 0.

    Raises:
        ValueError: when there is no text, or `vocab_size` cannot hold the special tokens and single characters.

    Example:
        >>> tokenizer = train_wordpiece(["to be or not to be"], vocab_size=40)
        >>> tokenizer.tokenize("not to be")
        ['not', 'to', 'be']
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    characters, pieces = _alphabet(texts, core)
    if not characters:
        raise ValueError("There is no text to train a tokenizer on: every document is empty. Check the text column.")
    first = [*SPECIAL_TOKENS, *pieces]
    if vocab_size < len(first):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and {len(pieces)} single-character pieces of "
            f"these texts come first, so no word could become a token. Use at least {len(first)}, better 1,000 and more."
        )
    # Left alone, the trainer numbers the single-character pieces in the order of a hash map and breaks ties between
    # merges by those numbers, so that ids and even tokens differ from run to run. Handed in as special tokens they are
    # numbered in our order. Only the vocabulary is taken from it: in the tokenizer below they are ordinary pieces.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    vocab = dict(sorted(core.get_vocab().items(), key=lambda entry: entry[1]))
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase, model_max_length=max_length)


def _alphabet(texts: list[str], core) -> tuple[list[str], list[str]]:
    """The characters of the text, and the pieces they make at the start (`a`) and inside (`##a`) of words."""
    starts, inside = Counter(), Counter()
    for text in texts:
        for word, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(text)):
            starts[word[0]] += 1
            inside.update(word[1:])
    counts = starts + inside
    kept = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:MAX_ALPHABET])
    return kept, [*kept, *(f"##{character}" for character in kept if character in inside)]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the tokens and their ids: two tokenizers with equal fingerprints give a model the same numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
