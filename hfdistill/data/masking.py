"""Collators of language models: masks that depend on seed, epoch and example alone, and causal labels that keep every `eos`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


IGNORED = -100
_INPUTS = ("attention_mask", "token_type_ids")


class MaskingCollator:
    r"""Pads rows and masks tokens for a masked language model, the same ones wherever and whenever a row is collated.

    A token is chosen with `mlm_probability`; 80 % of the chosen become the mask token, 10 % another token, 10 % stay, and
    labels are -100 elsewhere ([Devlin et al. 2019](https://huggingface.co/papers/1810.04805)). All draws come from a
    counter-based generator keyed by `(seed, epoch, example_id)`, so a resumed run, another batch size, number of workers or
    processes, and a stored teacher see the same masks. New masks come with [`set_epoch`], which `DistillationTrainer` calls.

    Where it differs from `DataCollatorForLanguageModeling`: a row with any ordinary token has at least one masked token (as
    in BERT's own data; the masked share of rows of n tokens rises by `(1 - p)^n / n`); special tokens, `[UNK]` among them, are
    neither chosen (as in DistilBERT) nor drawn as replacements (as in RoBERTa: a random `<pad>` would shift its positions);
    whole words keep 80/10/10, token by token as in BERT's own code. Padding is on the right.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a mask token.
        mlm_probability (`float`, defaults to 0.15): expected share of the ordinary tokens that are chosen.
        whole_word (`bool`, defaults to `False`): choose words instead of tokens, by the column `word_ids` where rows have it
            (see `encode_corpus`), otherwise by the `##` of WordPiece.
        frequency_smoothing (`float`, *optional*): choose a token with a probability proportional to `count^-s`; DistilBERT and
            [XLM](https://huggingface.co/papers/1901.07291) have 0.7. See [`smoothed_probabilities`]. A word is chosen with the
            mean probability of its tokens.
        token_counts (mapping or sequence, *optional*): count by token id, for `frequency_smoothing`.
        seed (`int`, defaults to 0): of the masks.
        replace_with_mask (`float`, defaults to 0.8), replace_with_random (`float`, defaults to 0.1): shares of the chosen tokens;
            the rest stays as it is.
        pad_to_multiple_of (`int`, *optional*): batch lengths are multiples of it.

    Shapes:
        rows: dicts with `input_ids`, the integer `example_id`, and `word_ids` where needed; a row with `labels` is masked
            already (see [`mask_dataset`]) and only padded.
        returns: `input_ids` and `labels` `(batch, length)`; `attention_mask` where rows have one or their lengths differ.

    Raises:
        ValueError: for a tokenizer without a mask token, shares that are no probabilities, smoothing without counts, and rows
            without `example_id` or word boundaries.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        *,
        whole_word: bool = False,
        frequency_smoothing: float | None = None,
        token_counts: Mapping[int, int] | Sequence[int] | None = None,
        seed: int = 0,
        replace_with_mask: float = 0.8,
        replace_with_random: float = 0.1,
        pad_to_multiple_of: int | None = None,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token, so nothing can be masked. Causal models take CausalCollator; for a masked "
                "one add the token and resize the embeddings."
            )
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be above 0 and at most 1, got {mlm_probability!r}. BERT has 0.15.")
        if min(replace_with_mask, replace_with_random) < 0 or replace_with_mask + replace_with_random > 1 + 1e-9:
            raise ValueError(
                f"replace_with_mask={replace_with_mask!r} and replace_with_random={replace_with_random!r} must be shares with a sum of at "
                "most 1: the rest of the chosen tokens stays. BERT has 0.8 and 0.1."
            )
        if frequency_smoothing is not None and token_counts is None:
            raise ValueError(
                f"frequency_smoothing={frequency_smoothing!r} needs to know how frequent tokens are. Pass token_counts, as count_tokens "
                "counts them, or leave frequency_smoothing out."
            )
        self.columns = ("example_id", "word_ids") if whole_word else ("example_id",)
        self.mlm_probability, self.whole_word, self.seed = mlm_probability, whole_word, seed
        self.replace_with_mask, self.replace_with_random = replace_with_mask, replace_with_random
        self.pad_to_multiple_of, self.pad_token_id = pad_to_multiple_of, tokenizer.pad_token_id or 0
        self.mask_token_id = tokenizer.mask_token_id
        # The tokenizer itself is not kept: what is sent to workers stays small.
        vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
        size = max([*vocabulary.values(), *special]) + 1
        self._ordinary = np.zeros(size, dtype=bool)
        self._ordinary[[i for i in vocabulary.values() if i not in special]] = True
        self._replacements = np.flatnonzero(self._ordinary)
        self._continues = np.zeros(size, dtype=bool)
        self._continues[[i for token, i in vocabulary.items() if token.startswith("##") and len(token) > 2]] = True
        self._probabilities = None
        if frequency_smoothing is not None:
            counts = np.where(self._ordinary, _as_array(token_counts, size), 0)
            self._probabilities = smoothed_probabilities(counts, mlm_probability, frequency_smoothing)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers of a data loader see the new value

    @property
    def epoch(self) -> int:
        """What the masks are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Other masks for another epoch; workers that are running see it too."""
        self._epoch.fill_(int(epoch))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        masked = []
        for row in rows:
            if row.get("labels") is not None:
                masked.append(row)
            elif "example_id" not in row:
                raise ValueError(
                    f"A row has no column 'example_id', only {sorted(row)}, so its masks could not be repeated. Encode the text with "
                    "encode_corpus, or add it: dataset.add_column('example_id', range(len(dataset)))."
                )
            else:
                inputs, labels = self.mask(row["input_ids"], int(row["example_id"]), row.get("word_ids"))
                masked.append({**row, "input_ids": inputs, "labels": labels})
        return _pad(masked, self.pad_token_id, self.pad_to_multiple_of)

    def mask(self, input_ids, example_id: int, word_ids=None, epoch: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Masked copy and labels of one row; `epoch` overrides that of [`set_epoch`]."""
        ids = np.asarray(input_ids, dtype=np.int64)
        key = np.random.SeedSequence([self.seed, self.epoch if epoch is None else epoch, example_id])
        generator = np.random.Generator(np.random.Philox(key))
        fallback = generator.random()
        choice, kind, other = generator.random((len(ids), 3)).T  # one triple a token: padding behind it changes nothing
        ordinary = self._ordinary[ids]
        chosen = self._choose(ids, ordinary, word_ids, choice, fallback)
        inputs = ids.copy()
        inputs[chosen & (kind < self.replace_with_mask)] = self.mask_token_id
        random = chosen & (kind >= self.replace_with_mask) & (kind < self.replace_with_mask + self.replace_with_random)
        inputs[random] = self._replacements[(other[random] * len(self._replacements)).astype(np.int64)]
        return inputs, np.where(chosen, ids, IGNORED)

    def mask_dataset(self, dataset: Dataset, epoch: int = 0) -> Dataset:
        """`dataset` masked once and for all, with columns `input_ids` and `labels`: the same question to every model and epoch."""
        from datasets import Dataset

        words = dataset["word_ids"] if self.whole_word and "word_ids" in dataset.column_names else [None] * len(dataset)
        pairs = [self.mask(*row, epoch) for row in zip(dataset["input_ids"], dataset["example_id"], words)]
        rest = {name: dataset[name][:] for name in _INPUTS if name in dataset.column_names}
        return Dataset.from_dict({"input_ids": [inputs for inputs, _ in pairs], "labels": [labels for _, labels in pairs], **rest})

    def _choose(self, ids, ordinary, word_ids, choice, fallback) -> np.ndarray:
        if not ordinary.any():
            return ordinary
        probability = np.full(len(ids), self.mlm_probability) if self._probabilities is None else self._probabilities[ids]
        unit = self._units(ids, ordinary, word_ids)  # each ordinary position belongs to one token or word
        members = np.bincount(unit[ordinary])
        chance = np.bincount(unit[ordinary], probability[ordinary]) / members
        first = np.full(len(members), len(ids))
        np.minimum.at(first, unit[ordinary], np.flatnonzero(ordinary))
        chosen = choice[first] < chance
        if not chosen.any():
            reached = np.cumsum(chance) / chance.sum()
            chosen[min(int(np.searchsorted(reached, fallback, side="right")), len(chance) - 1)] = True
        return ordinary & chosen[np.where(ordinary, unit, 0)]

    def _units(self, ids, ordinary, word_ids) -> np.ndarray:
        """Number of the unit of each position, from 0 on; meaningless at special tokens."""
        begins = ordinary.copy()
        if self.whole_word:
            after_ordinary = np.r_[False, ordinary[:-1]]
            if word_ids is not None:
                words = np.asarray(word_ids)
                begins &= ~(after_ordinary & (words == np.r_[-1, words[:-1]]))
            elif self._continues.any():
                begins &= ~(after_ordinary & self._continues[ids])
            else:
                raise ValueError(
                    "whole_word=True, but the rows have no column 'word_ids' and the vocabulary no '##' pieces, so where words begin is "
                    "not known. Encode the text with encode_corpus(whole_word=True), or set whole_word=False."
                )
        return np.maximum(np.cumsum(begins) - 1, 0)


class CausalCollator:
    """Pads rows for a causal language model: labels are the inputs, and -100 where there is padding.

    Padding is known by position, not by id: GPT-2 pads with its `eos`, and `DataCollatorForLanguageModeling(mlm=False)` then
    drops the end of every document from the loss. Labels are not shifted; models and losses do that. Padding is on the right.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): where it has no padding token, `eos` (else 0) fills the padding.
        pad_to_multiple_of (`int`, *optional*): batch lengths are multiples of it.

    Shapes:
        rows: dicts with `input_ids`.
        returns: `input_ids` and `labels` `(batch, length)`; `attention_mask` where rows have one or their lengths differ.
    """

    columns = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
        self.pad_token_id, self.pad_to_multiple_of = (known or [0])[0], pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labelled = []
        for row in rows:
            labels = np.asarray(row["input_ids"], dtype=np.int64)
            if "attention_mask" in row:
                labels = np.where(np.asarray(row["attention_mask"]) > 0, labels, IGNORED)
            labelled.append({**row, "labels": labels})
        return _pad(labelled, self.pad_token_id, self.pad_to_multiple_of)


def smoothed_probabilities(counts: Sequence[int] | np.ndarray, mlm_probability: float = 0.15, smoothing: float = 0.7) -> np.ndarray:
    r"""Probability of each token of being masked, `min(1, c · max(count, 1)^-s)`, rare tokens more often than frequent ones.

    `c` makes the expected share of masked tokens, `Σ count · p / Σ count`, equal to `mlm_probability`. DistilBERT draws 15 % of
    each batch with these weights, so the share of a text depends on its neighbours; this is the limit for large batches. On
    small corpora the rarest tokens reach 1: they are masked wherever they occur.

    Shapes:
        counts: `(vocabulary,)`, at least 0; returns `(vocabulary,)`.

    Raises:
        ValueError: when no token occurs, or `smoothing` is negative.

    Example:
        >>> smoothed_probabilities([100, 100], 0.15, 0.7).round(2).tolist()
        [0.15, 0.15]
    """
    counts = np.asarray(counts, dtype=np.float64)
    if smoothing < 0:
        raise ValueError(
            f"smoothing must be at least 0, got {smoothing!r}: below, frequent tokens would be masked most. DistilBERT has 0.7."
        )
    if counts.sum() <= 0:
        raise ValueError("Every token count is 0, so there is no frequency to smooth. Count the tokens of the training rows.")
    weights = np.maximum(counts, 1) ** -smoothing
    full = np.zeros(len(counts), dtype=bool)
    while True:
        free = counts * weights * ~full
        scale = (mlm_probability * counts.sum() - counts[full].sum()) / free.sum() if free.sum() else np.inf
        reached = ~full & (counts > 0) & (scale * weights >= 1)
        if not reached.any():
            break
        full |= reached
    # Tokens that never occur have the weight of count 1 and no part in the sum.
    return np.where(full, 1.0, np.minimum(1.0, scale * weights if np.isfinite(scale) else 1.0))


def count_tokens(rows: Sequence[Mapping[str, Any]], vocab_size: int) -> np.ndarray:
    """How often each token id occurs in the `input_ids` of `rows`; `(vocab_size,)`."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in rows:
        counts += np.bincount(np.asarray(row["input_ids"], dtype=np.int64), minlength=vocab_size)
    return counts


def _as_array(counts: Mapping[int, int] | Sequence[int], size: int) -> np.ndarray:
    pairs = counts.items() if isinstance(counts, Mapping) else enumerate(counts)
    array = np.zeros(size, dtype=np.float64)
    for token, count in pairs:
        if 0 <= token < size:  # embeddings may have rows beyond the vocabulary
            array[token] = count
    return array


def _pad(rows: Sequence[Mapping[str, Any]], pad_token_id: int, multiple: int | None) -> dict[str, torch.Tensor]:
    lengths = [len(row["input_ids"]) for row in rows]
    longest = -(-max(lengths) // (multiple or 1)) * (multiple or 1)
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    fills |= {name: 0 for name in _INPUTS if name in rows[0]}
    batch = {name: np.full((len(rows), longest), fill, dtype=np.int64) for name, fill in fills.items()}
    if "attention_mask" not in batch and min(lengths) < longest:
        batch["attention_mask"] = (np.arange(longest) < np.asarray(lengths)[:, None]).astype(np.int64)
    for i, row in enumerate(rows):
        for name in fills:
            batch[name][i, : lengths[i]] = row[name]
    return {name: torch.from_numpy(values) for name, values in batch.items()}
