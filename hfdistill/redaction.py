"""What is published names no folder of the machine it was made on, no user and no token."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any


_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=[-_]token[= ])\S+|(?<=--token[= ])\S+", re.IGNORECASE)
# A slash that begins a path: not inside a word, a relative path or a closing tag, and not the double slash of a URL.
_POSIX = re.compile(r"(?<![\w./<>~:])(?:file:/{2,3}|~\w*/|/(?!/))[\w.@+%-]+(?:/[\w.@+%-]*)*|(?<=\w:)/(?!/)[\w.@+%-]+(?:/[\w.@+%-]*)*")
_WINDOWS = re.compile(r"(?<![\w/\\])[A-Za-z]:[\\/](?!/)[\w.@+%\\/-]+")
_HOME = re.compile(r"(?:file://)?(?:[A-Za-z]:)?[\\/](?:home|Users)[\\/][^\\/]+[\\/]?|~\w*/")  # its last component is a user's name
_QUOTED = re.compile(r"""(['"])(?:~?/|[A-Za-z]:\\)[^'"\n]*\1""")


def shareable(value: Any) -> Any:
    """The same value with absolute paths cut to their last component and tokens hidden; lists and mappings at any depth.

    Hub ids, relative paths and URLs stay. A path with spaces is recognised where it is quoted, or is the whole text.

    Example:
        >>> shareable("train.py --output_dir /home/ana/runs/first --teacher org/teacher")
        'train.py --output_dir first --teacher org/teacher'
        >>> shareable({"url": "https://huggingface.co/org/teacher", "path": "/home/ana/my models/big"})
        {'url': 'https://huggingface.co/org/teacher', 'path': 'big'}
    """
    if isinstance(value, Mapping):
        return {shareable(key): shareable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(shareable(entry) for entry in value) if type(value) in (list, tuple) else [shareable(entry) for entry in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    text = _TOKEN.sub("<hidden>", value)
    if text.startswith(("/", "~/")) and "\n" not in text and not re.search(r"\s-|\s/|\.py\s", text):
        return _last(text)
    text = _QUOTED.sub(lambda match: match[1] + _last(match[0][1:-1]) + match[1], text)
    return _POSIX.sub(lambda match: _last(match[0]), _WINDOWS.sub(lambda match: _last(match[0]), text))


def _last(path: str) -> str:
    if _HOME.fullmatch(path):
        return "~"
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
