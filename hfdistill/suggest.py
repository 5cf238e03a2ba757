"""The tail of an error message about a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`; an empty string where none is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def nearest_or_all(name: object, known: Iterable[str]) -> str:
    """As `did_you_mean`; where no known name is near, all of them."""
    known = list(known)
    return did_you_mean(name, known) or f" Known: {', '.join(known)}."
