"""A teacher is anything that answers a batch with `Signals`."""

from .base_model import AdaptersOffTeacher
from .callable import CallableTeacher
from .frozen import FrozenTeacher


__all__ = ["AdaptersOffTeacher", "CallableTeacher", "FrozenTeacher"]
