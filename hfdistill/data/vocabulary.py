"""A tokenizer cut to the tokens that a corpus uses, with the token ids that a model has to keep for it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ALGORITHMS = ("WordPiece", "BPE", "Unigram")
_BATCH = 1000


def prune_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], min_count: int = 1, keep: Iterable[str] = ()
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Cuts a fast tokenizer to the tokens that `texts` use; the one given is not changed.

    A text whose tokens were all kept is cut into the same tokens as before, whatever the text. Other words fall back as the
    algorithm does: to shorter pieces, to bytes where it has them, to the unknown token at last. Beside the tokens of `texts`
    these stay: special and added tokens, `keep`, the single-character pieces of the characters in kept tokens, and what the
    algorithm needs: in BPE all merges on the way to a kept token and the 256 bytes (byte-level or byte fallback); in Unigram the
    piece with the lowest score, on which the score of unknown characters hangs. Scores, merges and ids keep their order.

    Vocabularies are cut for the words of one corpus in, for example,
    [Load what you need, Abdaoui et al. 2020](https://huggingface.co/papers/2010.05609).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer of WordPiece (BERT), BPE (GPT-2, RoBERTa, Llama) or Unigram
            (ALBERT, XLM-R, T5).
        texts (iterable of `str`): the corpus, never its test part.
        min_count (`int`, defaults to 1): how often a token has to occur in `texts`.
        keep (iterable of `str`): further tokens that stay.

    Returns:
        The pruned tokenizer, of the same class, and the old id of each of its tokens: `kept[new_id] == old_id`. Save it with
        `save_pretrained`; give the list to [`build_student`] as `vocabulary`.

    Raises:
        ValueError: for slow tokenizers and other algorithms, empty texts, unknown tokens in `keep`, a `min_count` below 1.

    Example:
        >>> from hfdistill import prune_tokenizer, train_wordpiece
        >>> tokenizer = train_wordpiece(["to be or not to be", "that is the question"], vocab_size=60)
        >>> pruned, kept = prune_tokenizer(tokenizer, ["to be"])
        >>> pruned.tokenize("to be"), [kept[i] for i in pruned("to be")["input_ids"]] == tokenizer("to be")["input_ids"]
        (['to', 'be'], True)
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    _check(tokenizer, texts, min_count)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        state = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        pieces = _pieces(state["model"])
        counts = _count(tokenizer, texts)
        used = {token for token, old in pieces.items() if counts[old] >= min_count}
        kept = _complete(state, pieces, used | added.keys() | _known(keep, pieces.keys() | added.keys()), added)
        # Tokens that only the list of added tokens has come after the pieces of the model: there Transformers puts them.
        order = sorted(kept & pieces.keys(), key=pieces.get) + sorted(added.keys() - pieces.keys(), key=added.get)
        old_ids = [pieces.get(token, added.get(token)) for token in order]
        _renumber(state, {old: new for new, old in enumerate(old_ids)}, kept)
        path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        _renumber_config(Path(folder, "tokenizer_config.json"), {old: new for new, old in enumerate(old_ids)})
        pruned = type(tokenizer).from_pretrained(folder)
    for name in ("name_or_path", "model_max_length", "padding_side", "truncation_side"):
        setattr(pruned, name, getattr(tokenizer, name))  # as they are now: what was set after loading is not always saved
    _verify(pruned, tokenizer, order, old_ids, texts)
    return pruned, old_ids


def _check(tokenizer: Any, texts: list[str], min_count: int) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its tables cannot be cut. Load it with AutoTokenizer and "
            "tokenizers installed, or keep its vocabulary."
        )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] not in ALGORITHMS:
        raise ValueError(
            f"{type(tokenizer).__name__} has the algorithm {model['type']!r}, for which it is not known which tokens others are built "
            f"from. Pruning is exact for {', '.join(ALGORITHMS)}; keep the vocabulary of this one."
        )
    if model.get("dropout"):
        raise ValueError(
            f"{type(tokenizer).__name__} drops merges at random (dropout={model['dropout']}), so the tokens of a text change from call "
            "to call and cannot be counted. Set tokenizer.backend_tokenizer.model.dropout = None first."
        )
    if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
        raise ValueError(f"min_count must be an integer >= 1, got {min_count!r}: tokens that never occur are what is cut.")
    if not any(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("There is no text, so only special tokens would be kept. Pass the texts of the corpus as strings.")


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    """Token -> id of the model's own table."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterable[list[int]]:
    for start in range(0, len(texts), _BATCH):
        yield from tokenizer(
            texts[start : start + _BATCH],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _count(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Counter:
    return Counter(chain.from_iterable(_encode(tokenizer, texts)))


def _known(keep: Iterable[str], tokens: set[str]) -> set[str]:
    keep = {keep} if isinstance(keep, str) else set(keep)
    unknown = sorted(map(str, keep - tokens))
    if unknown:
        raise ValueError(
            f"keep names {unknown[:5]}, which are no tokens of this tokenizer, so they cannot be kept. Give tokens as tokenizer.tokenize "
            "writes them, or add new ones with tokenizer.add_tokens."
        )
    return keep


def _complete(state: dict[str, Any], pieces: dict[str, int], wanted: set[str], added: dict[str, int]) -> set[str]:
    """`wanted` with what the algorithm needs so that these tokens are found, and the characters to fall back on."""
    model = state["model"]
    kept = set(wanted)
    kept |= {model["unk_token"]} & pieces.keys() if model.get("unk_token") is not None else set()
    if model["type"] == "Unigram":
        scored = dict(model["vocab"])
        # Unknown characters score 10 below the lowest piece; with a higher floor they could beat a kept segmentation.
        kept.add(min(scored, key=scored.get))
        if model["unk_id"] is not None:
            kept.add(model["vocab"][model["unk_id"]][0])
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    characters = set(chain.from_iterable(_bare(token, prefix, suffix) for token in kept - added.keys()))
    if '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]]):
        from tokenizers.pre_tokenizers import ByteLevel

        characters |= set(ByteLevel.alphabet())
    kept |= {token for token in pieces if _bare(token, prefix, suffix) in characters}
    if model.get("byte_fallback"):
        kept |= {f"<0x{byte:02X}>" for byte in range(256)} & pieces.keys()
    if model["type"] == "BPE":
        parts: dict[str, list[tuple[str, str]]] = {}
        for left, right, merged in _merges(model):
            parts.setdefault(merged, []).append((left, right))
        todo = list(kept)
        while todo:
            for token in chain.from_iterable(parts.get(todo.pop(), [])):
                if token not in kept:
                    kept.add(token)
                    todo.append(token)
    return kept


def _bare(token: str, prefix: str, suffix: str) -> str:
    """The token without the marks of its place in the word; a mark alone is a piece of text."""
    bare = token.removeprefix(prefix).removesuffix(suffix)
    return bare or token


def _merges(model: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Left part, right part and result of each merge, in order."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right[len(prefix) :]


def _renumber(state: dict[str, Any], new_ids: dict[int, int], kept: set[str]) -> None:
    """Cuts and renumbers the state of a `tokenizers.Tokenizer` in place."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        table = {token: new_ids[old] for token, old in model["vocab"].items() if token in kept}
        model["vocab"] = dict(sorted(table.items(), key=lambda entry: entry[1]))
    else:
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
    if model.get("unk_id") is not None:
        model["unk_id"] = new_ids[model["unk_id"]]
    if "merges" in model:
        model["merges"] = [merge for merge, (_, _, merged) in zip(model["merges"], _merges(model), strict=True) if merged in kept]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if state["padding"]:
        state["padding"]["pad_id"] = new_ids[state["padding"]["pad_id"]]
    post = state["post_processor"] or {}
    for processor in [post, *post.get("processors", [])]:
        for name in ("sep", "cls"):
            if name in processor:
                processor[name][1] = new_ids[processor[name][1]]
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [new_ids[old] for old in special["ids"]]


def _renumber_config(path: Path, new_ids: dict[int, int]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("unk_id"), int):
        config["unk_id"] = new_ids[config["unk_id"]]
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _verify(pruned: Any, tokenizer: Any, order: list[str], old_ids: list[int], texts: list[str]) -> None:
    """The class of a tokenizer may build its tables anew when it is loaded; what it made is compared with what it was given."""
    expected = {token: new for new, token in enumerate(order)}
    new_ids = {old: new for new, old in enumerate(old_ids)}
    vocab = pruned.get_vocab()
    wrong = sorted(token for token in vocab.keys() | expected.keys() if vocab.get(token) != expected.get(token))
    if not wrong:
        for old, new in zip(_encode(tokenizer, texts), _encode(pruned, texts), strict=True):
            if all(token in new_ids for token in old) and [new_ids[token] for token in old] != new:
                wrong = tokenizer.convert_ids_to_tokens(old)
                break
    if wrong:
        raise ValueError(
            f"{type(tokenizer).__name__} does not keep its tokens when its vocabulary is cut (first seen at {wrong[:5]}): its class adds "
            "to the tables it is loaded with. Keep the vocabulary of this one."
        )
