"""What may stand in the place of a word: the choice of a masked language model, or the nearest words of its embedding table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from ..models.anatomy import unwrap_peft


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WORDS_AT_ONCE = 256  # rows of a product with the whole embedding table


class Slot(NamedTuple):
    """A word that may be replaced: its place in the text, and what may stand there."""

    start: int
    end: int
    options: tuple[str, ...]


def context_length(model, tokenizer, max_length: int | None) -> int:
    """Tokens of one text that the model sees, special ones included."""
    # RoBERTa counts positions from the padding id + 1, so that its table has rows which no token reaches.
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    unreachable = getattr(embeddings, "padding_idx", None)
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    limit = min(tokenizer.model_max_length, positions - (0 if unreachable is None else unreachable + 1))
    special = tokenizer.num_special_tokens_to_add()
    if max_length is None:
        return int(limit)
    if not special < max_length <= limit:
        raise ValueError(
            f"max_length={max_length} does not fit: {special} special tokens leave no room below {special + 1}, and {type(model).__name__} "
            f"with this tokenizer takes at most {limit}."
        )
    return max_length


class Proposer:
    """Finds the slots of texts, in batches; what it knows of a word of several pieces is kept."""

    def __init__(self, model, tokenizer, candidates, batch_size, neighbours, stop_words, max_length):
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length, self.stop_words = batch_size, max_length, frozenset(stop_words)
        self.neighbours, self.near = neighbours, {}
        words = whole_words(tokenizer)
        if not words:
            raise ValueError(
                f"No entry of the vocabulary ({len(tokenizer)} tokens) is a whole word of letters, so there is nothing to put in the place "
                "of a word. Use a model with a word or subword vocabulary."
            )
        self.word_of, self.ids, self.words = words, list(words), list(words.values())
        self.candidates = min(candidates, len(words))

    def __call__(self, texts: Sequence[str]) -> dict[str, list[Slot]]:
        """Text -> its slots, in order; a slot with no options is left out."""
        texts = list(dict.fromkeys(texts))
        spans, masked = {text: [] for text in texts}, []
        for text, (ids, found) in zip(texts, self._words(texts)):
            for start, end, first, count in found:
                pieces = tuple(ids[first : first + count])
                spans[text].append((start, end, pieces))
                if count == 1:
                    masked.append((text, len(spans[text]) - 1, [*ids[:first], self.tokenizer.mask_token_id, *ids[first + 1 :]], first))
        proposed = self._proposed(masked)
        if self.neighbours == "embedding":
            self._find_near({pieces for found in spans.values() for _, _, pieces in found if len(pieces) > 1})
        slots = {}
        for text in texts:
            slots[text] = []
            for number, (start, end, pieces) in enumerate(spans[text]):
                options = proposed[text, number] if len(pieces) == 1 else self._near(text[start:end], pieces)
                # In a vocabulary of lower-case words the word itself would come back in lower case: no replacement at all.
                own, same = text[start:end], self.word_of.get(pieces[0]) if len(pieces) == 1 else None
                options = tuple(own if option == same else option for option in options)
                if options:
                    slots[text].append(Slot(start, end, options))
        return slots

    def _words(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int, int, int]]]]:
        """Token ids of each text, cut to the context, and its replaceable words as (start, end, first token, tokens)."""
        encoded = self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False) if texts else {}
        for row, text in enumerate(texts):
            ids, offsets, words = encoded["input_ids"][row], encoded["offset_mapping"][row], encoded.word_ids(row)
            inside = [position for position, sequence in enumerate(encoded.sequence_ids(row)) if sequence is not None]
            kept = len(inside) - max(len(ids) - self.max_length, 0)
            letters = {
                position: run
                for run, match in enumerate(re.finditer(r"\w+", text))
                if match.group().isalpha() and match.group().lower() not in self.stop_words
                for position in range(match.start(), match.end())
            }
            groups, covered = {}, set()  # tokens of one word of the tokenizer that lie in one run of letters
            for position in inside:
                start, end = offsets[position]
                start += len(text[start:end]) - len(text[start:end].lstrip())
                if start < end and start in letters and letters.get(end - 1) == letters[start]:
                    groups.setdefault((words[position], letters[start]), []).append((position, start, end))
                    covered.update(range(start, end))
            # A token that reaches over the end of a word takes a part of it along: such words stay.
            torn = {run for position, run in letters.items() if position not in covered}
            cut = set(inside[kept:])
            found = [
                (tokens[0][1], tokens[-1][2], tokens[0][0], len(tokens))
                for (_, run), tokens in groups.items()
                if run not in torn
                and tokens[-1][0] not in cut
                and not any(ids[position] == self.tokenizer.unk_token_id for position, _, _ in tokens)
            ]
            yield [token for position, token in enumerate(ids) if position not in cut], found

    def _proposed(self, masked: list[tuple[str, int, list[int], int]]) -> dict[tuple[str, int], tuple[str, ...]]:
        """(text, number of the word) -> the words that the model holds most probable there, in the order of their ids."""
        import torch

        proposed, device = {}, self.model.device
        masked = sorted(masked, key=lambda entry: -len(entry[2]))
        allowed = torch.tensor(self.ids, device=device)
        with _evaluating(self.model) as only_at:
            for at in range(0, len(masked), self.batch_size):
                batch = masked[at : at + self.batch_size]
                width = max(len(ids) for _, _, ids, _ in batch)
                ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
                attention = torch.zeros(len(batch), width, dtype=torch.long)
                for row, (_, _, tokens, _) in enumerate(batch):
                    ids[row, : len(tokens)] = torch.tensor(tokens)
                    attention[row, : len(tokens)] = 1
                places = torch.tensor([place for _, _, _, place in batch], device=device)
                logits = only_at(places, input_ids=ids.to(device), attention_mask=attention.to(device))
                best = logits[:, allowed].float().topk(self.candidates).indices.cpu()
                for (text, number, _, _), row in zip(batch, best.tolist()):
                    # Equally probable words change places with rounding: their order must not decide which is drawn.
                    proposed[text, number] = tuple(self.words[i] for i in sorted(row))
        return proposed

    def _find_near(self, words: set[tuple[int, ...]]) -> None:
        """Keeps the nearest whole words of words given as pieces."""
        import torch
        from torch.nn.functional import normalize

        new = sorted(words - self.near.keys())
        if not new:
            return
        with torch.no_grad():
            table = self.model.get_input_embeddings().weight.detach().float()
            whole = normalize(table[torch.tensor(self.ids, device=table.device)], dim=-1)
            for at in range(0, len(new), WORDS_AT_ONCE):
                part = new[at : at + WORDS_AT_ONCE]
                vectors = torch.stack([table[torch.tensor(pieces, device=table.device)].mean(0) for pieces in part])
                best = (normalize(vectors, dim=-1) @ whole.T).topk(self.candidates).indices.cpu()
                for pieces, row in zip(part, best.tolist()):
                    self.near[pieces] = tuple(self.words[i] for i in sorted(row))

    def _near(self, word: str, pieces: tuple[int, ...]) -> tuple[str, ...]:
        if isinstance(self.neighbours, Mapping):
            return tuple(self.neighbours.get(word.lower(), ()))[: self.candidates]
        return self.near.get(pieces, ())


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> word, for every entry of the vocabulary that is a whole word of letters, in the order of the ids.

    An entry counts where its text, set after another word, is read as this one token: pieces inside words (`##ing`, or
    `ing` beside `Ġing`), special tokens, punctuation and numbers do not.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)]
    pairs = [(i, text) for i, text in zip(ids, texts) if text.isalpha()]
    if not pairs:
        return {}
    before = "a"
    length = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    encoded = tokenizer([f"{before} {text}" for _, text in pairs], add_special_tokens=False)["input_ids"]
    return {i: text for (i, text), tokens in zip(pairs, encoded) if tokens[length:] == [i]}


@contextmanager
def _evaluating(model):
    """A function that gives the logits of `model` at one position a row; the vocabulary head runs on these positions only."""
    import torch

    places = None

    def keep(module, args, output):
        output["last_hidden_state"] = output["last_hidden_state"][torch.arange(len(places), device=places.device), places][:, None]
        return output

    def only_at(positions, **inputs):
        nonlocal places
        places = positions
        logits = model(**inputs, return_dict=True).logits
        return logits[torch.arange(len(places), device=places.device), places] if logits.shape[1] > 1 else logits[:, 0]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    hook = unwrap_peft(model).base_model.register_forward_hook(keep)
    try:
        with torch.no_grad():
            yield only_at
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
