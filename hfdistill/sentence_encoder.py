"""The files that tell sentence-transformers how a model turns a text into one vector: read from a teacher, written for a student."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# Names in 1_Pooling/config.json that every version of sentence-transformers reads.
_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
_OTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
_SHORT = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@dataclass(frozen=True)
class SentenceEncoder:
    """How a folder of sentence-transformers makes its embeddings.

    Attributes:
        pooling (`str`): `mean`, `cls` or `last`, as the knob `pooling` has it.
        normalize (`bool`): whether `encode` scales vectors to length 1. The signal `pooled` never does: the cosine loss does not see
            the difference, and MSE then also learns the length.
        max_seq_length (`int`, *optional*): tokens, after which it cuts texts.
    """

    pooling: str
    normalize: bool = False
    max_seq_length: int | None = None


def read_sentence_encoder(
    name_or_path: str | os.PathLike, revision: str | None = None, cache_dir: str | None = None
) -> SentenceEncoder | None:
    """What `modules.json` and its companions say; `None` for a model that did not come from sentence-transformers.

    Args:
        name_or_path: a folder or a Hub id.

    Raises:
        ValueError: for encoders that are more than a transformer, one kind of pooling (mean, cls or lasttoken) and a final
            normalisation, such as those with a Dense module or with prompts: a student distilled from their transformer alone would
            learn something else than their embeddings.
    """
    name = os.fspath(name_or_path)

    def read(file: str) -> Any:
        path = _find(name, file, revision, cache_dir)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"The sentence encoder {name!r} {what}, which hfdistill does not imitate: the student would learn other vectors than `encode` "
            "gives. Use a teacher made of a transformer, mean, cls or lasttoken pooling and at most a normalisation, or pass a function "
            "that returns Signals(pooled=model.encode(...))."
        )

    modules = read("modules.json")
    if modules is None:
        return None
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise refuse(f"consists of {' -> '.join(kinds)}")
    if modules[0]["path"]:
        raise refuse(f"keeps its transformer in the folder {modules[0]['path']!r}")
    pooling = read(f"{modules[1]['path']}/config.json") or {}
    old = {"mean_tokens": "mean", "cls_token": "cls"}
    modes = pooling.get("pooling_mode") or [
        old.get(key.removeprefix("pooling_mode_"), key.removeprefix("pooling_mode_"))
        for key, on in pooling.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    modes = [modes] if isinstance(modes, str) else list(modes or ["mean"])
    if len(modes) != 1 or modes[0] not in _SHORT:
        raise refuse(f"pools by {' and '.join(modes)}")
    settings, transformer = read("config_sentence_transformers.json") or {}, read("sentence_bert_config.json") or {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    if prompt:
        raise refuse(f"puts the prompt {prompt!r} before every text")
    if transformer.get("do_lower_case"):
        raise refuse("lower-cases every text before its tokenizer sees it")
    if transformer.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise refuse(f"runs its transformer for {transformer['transformer_task']}")
    return SentenceEncoder(_SHORT[modes[0]], "Normalize" in kinds, transformer.get("max_seq_length"))


def save_sentence_encoder(
    folder: str | os.PathLike, pooling: str, width: int, max_seq_length: int | None = None, normalize: bool = False
) -> None:
    """Writes what `SentenceTransformer(folder)` needs beside the model and tokenizer of a student, whose weights stay as they are.

    `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json` and `1_Pooling/config.json`, in the form that old
    and new versions read. `AutoModel.from_pretrained(folder)` is not changed by them.

    Args:
        folder: where `save_pretrained` has written the model and its tokenizer.
        pooling: `mean`, `cls` or `last`.
        width: of the hidden states.
        max_seq_length: tokens, after which texts are cut. Default: what the tokenizer says.
        normalize: scale vectors to length 1, as the last step of `encode`.

    Raises:
        ValueError: for another pooling, such as `auto`.
    """
    if pooling not in _MODES:
        raise ValueError(
            f"pooling={pooling!r} cannot be written for sentence-transformers, which does not know a model's own pooler. Train with "
            f"pooling set to one of {', '.join(_MODES)}."
        )
    folder = Path(folder)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(parts)
    ]
    modes = {f"pooling_mode_{mode}": mode == _MODES[pooling] for mode in (*_MODES.values(), *_OTHER_MODES)}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes, "include_prompt": True},
    }
    for path, _ in parts[1:]:
        (folder / path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _find(name: str, file: str, revision: str | None, cache_dir: str | None) -> str | None:
    """Path of a file of a folder or Hub repository, or `None` where there is none."""
    if os.path.isdir(name):
        path = os.path.join(name, *file.split("/"))
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(name, file, revision=revision, cache_dir=cache_dir)
    except LocalEntryNotFoundError:
        logger.warning(
            "%s of %s is not in the cache and the Hub cannot be reached: if it is a sentence-transformers model, set pooling to its own.",
            file,
            name,
        )
        return None
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None  # no such file, or no such model: loading the model itself says so
