"""Small byte-level BPE tokenizers trained from text, for models of the RoBERTa and GPT-2 kinds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPECIAL_TOKENS = {"roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), "gpt2": ("<|endoftext|>",)}


def train_byte_level(texts: Iterable[str], vocab_size: int = 3000, kind: str = "roberta", max_length: int = 512) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on `texts`; the same texts give the same ids in every process.

    Args:
        texts (iterable of `str`): the text to learn from; never the test part.
        vocab_size (`int`, defaults to 3000): tokens, 256 bytes and the special ones included.
        kind (`str`, defaults to `"roberta"`): `"roberta"` (`<s> ... </s>`, with a mask token and the ids that RobertaConfig expects) or
            `"gpt2"` (one special token, `<|endoftext|>`, and no padding token).
        max_length (`int`, defaults to 512): the tokenizer's `model_max_length`.

    Returns:
        `RobertaTokenizer` or `GPT2Tokenizer`: save it with `save_pretrained`; `AutoTokenizer` loads it.

    Raises:
        ValueError: for another `kind`, no text, or a `vocab_size` without room for all bytes.

    Example:
        >>> tokenizer = train_byte_level(["to be or not to be"], vocab_size=270, kind="gpt2")
        >>> tokenizer.decode(tokenizer("not to be")["input_ids"])
        'not to be'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer, RobertaTokenizer

    if kind not in SPECIAL_TOKENS:
        raise ValueError(f"kind must be one of {', '.join(SPECIAL_TOKENS)}, got {kind!r}: the special tokens would not be known.")
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), list(SPECIAL_TOKENS[kind])
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {len(special)} special tokens come first. Use at least "
            f"{len(alphabet) + len(special)}, better 1,000 and more."
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("There is no text to train a tokenizer on: every document is empty. Check the text column.")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    trained = json.loads(core.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    vocab = dict(sorted(trained["vocab"].items(), key=lambda entry: entry[1]))
    tokenizer_class = RobertaTokenizer if kind == "roberta" else GPT2Tokenizer
    return tokenizer_class(vocab=vocab, merges=merges, model_max_length=max_length)
