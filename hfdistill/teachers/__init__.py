"""A teacher is anything that answers a batch with `Signals`."""

from .callable import CallableTeacher
from .frozen import FrozenTeacher


__all__ = ["CallableTeacher", "FrozenTeacher"]
