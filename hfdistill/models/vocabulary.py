"""The part of a model that depends on its vocabulary, cut to the tokens that a student keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def resolve_kept(vocabulary: Iterable[int], teacher: PreTrainedModel) -> list[int]:
    """The teacher's token id of each row the student keeps, checked.

    Args:
        vocabulary: the second value of `prune_tokenizer`, or any ids: a list, an array or a tensor.
        teacher: the model they belong to.

    Raises:
        ValueError: for models without a vocabulary, ids that are no integers, twice there or out of range, and ids that
            positions are counted from (RoBERTa, MPNet: the padding id) when they get another number.
    """
    size = getattr(teacher.config, "vocab_size", None)
    if size is None:
        raise ValueError(f"{type(teacher).__name__} has no vocabulary, so there is nothing to keep of it. Leave vocabulary out.")
    kept = vocabulary.tolist() if hasattr(vocabulary, "tolist") else list(vocabulary)
    wrong = [i for i in kept if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise ValueError(f"vocabulary must hold token ids of the teacher, got {wrong[:3]!r}. Pass the list that prune_tokenizer returns.")
    outside = [i for i in kept if not 0 <= i < size]
    if outside or not kept:
        what = f"names ids {outside[:5]}" if outside else "is empty"
        raise ValueError(f"vocabulary {what}, but {type(teacher).__name__} has rows 0 to {size - 1}. Prune the teacher's own tokenizer.")
    if len(set(kept)) < len(kept):
        twice = sorted({i for i in kept if kept.count(i) > 1})[:5] if len(kept) < 1000 else "some"
        raise ValueError(f"vocabulary names ids twice ({twice}), so two tokens of the student would be one of the teacher. Name each once.")
    words = teacher.get_input_embeddings()
    for module in teacher.modules():
        first = getattr(module, "padding_idx", None) if isinstance(module, nn.Embedding) and module is not words else None
        if first is not None and (first >= len(kept) or kept[first] != first):
            raise ValueError(
                f"{type(teacher).__name__} counts positions from token id {first} (padding), so that token must keep its number, but "
                f"vocabulary gives it {kept.index(first) if first in kept else 'none'}. Keep the ids 0 to {first} in their places."
            )
    return kept


def renumber_token_ids(config: Any, kept: list[int], size: int) -> None:
    """Gives the special tokens of a config or generation config their new ids, in place.

    Ids outside the teacher's vocabulary (defaults of the class that mean nothing) stay as they are.

    Args:
        config: entries that end in `_token_id` are changed; lists of tokens that generation avoids are cut to kept ones.
        kept: teacher id of each student token.
        size: the teacher's vocabulary size.

    Raises:
        ValueError: when a special token is not among the kept ones.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and value is not None:
            ids = value if isinstance(value, (list, tuple)) else [value]
            missing = [i for i in ids if isinstance(i, int) and 0 <= i < size and i not in new_ids]
            if missing:
                raise ValueError(
                    f"{type(config).__name__}.{name} is {value}, but vocabulary does not keep {missing}: the student could not read or "
                    f"write this special token. Add it to vocabulary (prune_tokenizer keeps special tokens), or set {name} to None if "
                    "the teacher does not use it."
                )
            ids = [new_ids.get(i, i) for i in ids]
            setattr(config, name, ids if isinstance(value, (list, tuple)) else ids[0])
        elif name in ("suppress_tokens", "begin_suppress_tokens") and value:
            setattr(config, name, [new_ids[i] for i in value if i in new_ids])
        elif name == "bad_words_ids" and value:
            setattr(config, name, [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)] or None)


def vocabulary_rows(model: PreTrainedModel, kept: list[int]) -> dict[int, Tensor]:
    """`id` of each parameter with a row for each token (embeddings, output head, its biases) -> its kept rows."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [embeddings.weight]
    if head is not None:
        found += list(head.parameters(recurse=False))
        path = next(name for name, module in model.named_modules() if module is head)
        # The bias of BERT's head lies on the module around the decoder, where it may be tied to that of the decoder.
        above = [model.get_submodule(path[:i]) for i, character in enumerate(path) if character == "."]
        found += [m.bias for m in above if isinstance(getattr(m, "bias", None), nn.Parameter) and m.bias.shape == (head.weight.size(0),)]
    cut = {}
    for parameter in found:
        cut[id(parameter)] = parameter.detach().index_select(0, torch.tensor(kept, device=parameter.device))
    return cut
