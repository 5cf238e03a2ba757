"""A teacher is anything that answers a batch with `Signals`."""

from .base_model import AdaptersOffTeacher
from .callable import CallableTeacher
from .frozen import FrozenTeacher
from .store_table import TeacherStore
from .store_writing import store_teacher
from .stored import StoredTeacher


__all__ = ["AdaptersOffTeacher", "CallableTeacher", "FrozenTeacher", "StoredTeacher", "TeacherStore", "store_teacher"]
