"""TinyBERT's data augmentation: words replaced by what a masked language model, or its embedding table, proposes in their place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.anatomy import task_of, vocabulary_size
from .candidates import Proposer, Slot, context_length


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


AUGMENTATION_COPIES = {"cola": 30, "mnli": 10, "mrpc": 30, "qnli": 20, "qqp": 10, "rte": 30, "sst2": 20, "stsb": 30}
"""GLUE task -> copies of each example, as in the authors' `data_augmentation.py` (the paper's text says 20 for all)."""

STOP_WORDS = frozenset(
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself they "
    "them their theirs themselves this that these those am is are was were be been being have has had having do does did doing a an the "
    "and but if or because as until while of at by for with about against between into through during before after above below to from "
    "up down in out on off over under again further then once here there all any both each few more most other some such no nor not only "
    "own same so than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma "
    "mightn mustn needn shan shouldn wasn weren won wouldn".split()
)
"""English words that are never replaced: the list of the authors' code (NLTK's); parts of contractions stand alone."""

CHUNK = 1024  # rows whose candidates are held at once


def augment_texts(
    rows: Dataset,
    text_columns: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    copies: int = 20,
    candidates: int = 15,
    probability: float = 0.4,
    batch_size: int = 64,
    seed: int = 0,
    neighbours: str | Mapping[str, Sequence[str]] = "embedding",
    stop_words: Collection[str] = STOP_WORDS,
    max_length: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Copies of texts in which words are replaced by likely ones: algorithm 1 of [TinyBERT](https://huggingface.co/papers/1909.10351).

    A word of one piece is masked and may become one of the `candidates` words that the masked language model holds most
    probable there; a word of several pieces, one of the `candidates` nearest words in the model's own embedding table
    (cosine, against the mean of its pieces; the paper takes GloVe). In each copy each word is replaced with `probability`, by
    a word drawn uniformly from its candidates, the word itself being one of them where the model proposes it. Stop
    words, and words with anything but letters in them, stay. So does everything around the words: a replacement is written into the
    text as it is, in the letter case of the tokenizer's vocabulary.

    The candidates of a word are found once, with all other words in place, as in the authors' code; the paper's pseudo-code would
    find them anew in each copy. Unlike in that code, the model does not see the unmasked sentence beside the masked one;
    pieces of words, punctuation and special tokens do not use up places among the candidates; and
    the two texts of a pair are replaced in step (copy `n` of the first with copy `n` of the second), not every second text
    with the last copy of the first.

    What is drawn depends on `seed` and on the texts of the row, not on its place, on the other rows or on `batch_size` (up to
    rounding in the model, where two words are equally probable). The first copies are the same for any number of `copies`.

    Args:
        rows (`datasets.Dataset`): the examples; only the text columns are read.
        text_columns (sequence of `str`): one column, or several that belong together.
        model (`PreTrainedModel`): any masked language model; it runs where it is, in eval mode and without gradients.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, one of the Rust `tokenizers` (WordPiece, byte-level BPE, Unigram).
        copies (`int`, defaults to 20): N_a, at most so many new rows for each row. Per task: `AUGMENTATION_COPIES`.
        candidates (`int`, defaults to 15): K.
        probability (`float`, defaults to 0.4): p_t.
        batch_size (`int`, defaults to 64): masked texts in one forward pass.
        seed (`int`, defaults to 0): of the draws.
        neighbours (`str` or mapping, defaults to `"embedding"`): `"embedding"`; `"none"` leaves words of several pieces alone; a mapping
            from lower-case words to words, such as lists made from GloVe.
        stop_words (collection of `str`): words that stay, in lower case.
        max_length (`int`, *optional*): tokens of context that the model sees; words after them stay. Default: the model's limit.
        cache_dir (`str`, *optional*): folder where the result is kept as Arrow, under a name made from texts, weights, tokenizer and
            settings; found there, it is read back. With several processes call this under `args.main_process_first()`.

    Returns:
        `datasets.Dataset` with the text columns and `source`, the number of the row each text was made from. First all rows as they
        came, then the copies in order of `source`. A copy that equals its original or an earlier copy of it is left out. There are no
        labels: a label may not survive a replacement, so whether copies carry that of their source is the caller's choice.

    Raises:
        ValueError: for a model that is no masked language model, a tokenizer without offsets or mask token, or settings out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> from hfdistill import augment_texts, train_wordpiece
    >>> rows = Dataset.from_dict({"text": ["Return the sum.", "Return the product."], "label": [1, 0]})
    >>> tokenizer = train_wordpiece(rows["text"], vocab_size=60)
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    >>> model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    >>> more = augment_texts(rows, ["text"], model, tokenizer, copies=3)
    >>> more["text"][:2], more["source"][:2]
    (['Return the sum.', 'Return the product.'], [0, 1])
    >>> labels = [rows["label"][i] for i in more["source"]]  # or -100 for every row

    ```
    """
    text_columns = tuple(text_columns)
    _check(rows, text_columns, model, tokenizer, copies, candidates, probability, batch_size, neighbours)
    max_length = context_length(model, tokenizer, max_length)
    if cache_dir is None:
        proposer = Proposer(model, tokenizer, candidates, batch_size, neighbours, stop_words, max_length)
        return _augment(rows, text_columns, proposer, copies, probability, seed)

    from datasets import load_from_disk

    extra = sorted(neighbours.items()) if isinstance(neighbours, Mapping) else neighbours
    settings = [text_columns, copies, candidates, probability, seed, extra, sorted(stop_words), max_length]
    folder = Path(cache_dir, f"augmented-{_fingerprint(rows, text_columns, model, tokenizer, settings)[:32]}")
    if not folder.is_dir():
        proposer = Proposer(model, tokenizer, candidates, batch_size, neighbours, stop_words, max_length)
        aside = folder.with_name(f"{folder.name}.{os.getpid()}")
        _augment(rows, text_columns, proposer, copies, probability, seed).save_to_disk(aside)
        try:
            os.replace(aside, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(aside)  # another process was faster
    return load_from_disk(str(folder))


def _check(rows, text_columns, model, tokenizer, copies, candidates, probability, batch_size, neighbours) -> None:
    missing = [name for name in text_columns if name not in rows.column_names]
    if missing or not text_columns or "source" in text_columns:
        raise ValueError(f"text_columns={list(text_columns)} must be one or more columns of {rows.column_names}, other than 'source'.")
    if task_of(model) != "masked_lm":
        raise ValueError(
            f"Candidates for a masked word come from a masked language model, and {type(model).__name__} is none: it predicts no words. "
            "Load the general teacher with AutoModelForMaskedLM."
        )
    if not getattr(tokenizer, "is_fast", False) or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} (is_fast={getattr(tokenizer, 'is_fast', False)}, mask_token={tokenizer.mask_token!r}, "
            f"pad_token={tokenizer.pad_token!r}) cannot be used: words are found by character offsets, which only the Rust tokenizers "
            "give, then masked and padded. Load the model's tokenizer with AutoTokenizer."
        )
    if len(tokenizer) > vocabulary_size(model):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and {type(model).__name__} only {vocabulary_size(model)}: they do not belong "
            "together. Load both from one checkpoint."
        )
    for name, value in (("copies", copies), ("candidates", candidates), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "copies"):
            raise ValueError(f"{name} must be a whole number of at least {int(name != 'copies')}, got {value!r}.")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie between 0 (nothing is replaced) and 1 (every word is), got {probability!r}. Usual: 0.4.")
    if not isinstance(neighbours, Mapping) and neighbours not in ("embedding", "none"):
        raise ValueError(f"neighbours must be 'embedding', 'none' or a mapping from words to lists of words, got {neighbours!r}.")


def _augment(rows, text_columns, proposer: Proposer, copies: int, probability: float, seed: int) -> Dataset:
    from datasets import Dataset, Features, Value, concatenate_datasets
    from tqdm.auto import tqdm

    features = Features({**{name: Value("string") for name in text_columns}, "source": Value("int64")})
    texts = rows.select_columns(list(text_columns))
    originals = Dataset.from_dict({**{name: texts[name][:] for name in text_columns}, "source": list(range(len(rows)))}, features=features)
    parts = [originals]
    with tqdm(total=len(rows), desc="Augmenting", unit="row", leave=False, disable=None) as bar:
        for at in range(0, len(rows), CHUNK):
            chunk = texts[at : at + CHUNK]
            examples = list(zip(*(chunk[name] for name in text_columns)))
            _refuse_missing(examples, at, text_columns)
            slots = proposer([text for example in examples for text in example]) if copies and probability else {}
            new = {name: [] for name in features}
            for number, example in enumerate(examples, at):
                for copy in _copies(example, slots, copies, probability, seed):
                    for name, value in zip(new, (*copy, number)):
                        new[name].append(value)
            parts.append(Dataset.from_dict(new, features=features))
            bar.update(len(examples))
    return concatenate_datasets(parts)


def _refuse_missing(examples: list[tuple], at: int, text_columns) -> None:
    for number, example in enumerate(examples, at):
        for name, text in zip(text_columns, example):
            if not isinstance(text, str):
                raise ValueError(f"Row {number} of column {name!r} holds {text!r} instead of a text. Fill it or drop the row.")


def _copies(example: tuple[str, ...], slots: Mapping[str, list[Slot]], copies: int, probability: float, seed: int) -> list[tuple[str, ...]]:
    """At most `copies` new versions of one row, none equal to it or to another."""
    found = {example: None}
    own = [slots.get(text, []) for text in example]
    count = sum(map(len, own))
    if count:
        key = hashlib.sha256(json.dumps([seed, *example]).encode()).digest()
        # One line of draws a copy: the first copies are the same whatever their number.
        draws = np.random.default_rng(np.frombuffer(key, dtype=np.uint32)).random((copies, count, 2))
        for line in draws.tolist():
            line = iter(line)
            found[tuple(_replace(text, places, line, probability) for text, places in zip(example, own))] = None
    return list(found)[1:]


def _replace(text: str, slots: list[Slot], draws: Iterator[list[float]], probability: float) -> str:
    parts, at = [], 0
    for start, end, options in slots:
        chance, choice = next(draws)
        if chance < probability:
            parts += [text[at:start], options[int(choice * len(options))]]
            at = end
    return "".join([*parts, text[at:]])


def _fingerprint(rows, text_columns, model, tokenizer, settings: list[Any]) -> str:
    """sha256 of everything that decides the copies."""
    import torch

    digest = hashlib.sha256(json.dumps([type(model).__name__, *settings]).encode())
    for name in text_columns:
        digest.update(json.dumps(rows[name][:]).encode())
    reading = json.loads(tokenizer.backend_tokenizer.to_str())
    config = model.config.to_dict()
    # Saving a model writes its class and dtype into its config; both are known from the model itself.
    passing = {"truncation", "padding", "transformers_version", "_name_or_path", "architectures", "dtype"}
    for part in (reading, config):
        part = {key: value for key, value in part.items() if key not in passing}
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
