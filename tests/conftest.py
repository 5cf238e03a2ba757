"""No network, no progress bars, the same seed everywhere, and no deprecated call of transformers."""

from __future__ import annotations

import os


# Before any test module imports a library: these are read at import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads cost more than they bring

import logging
import random
import socket

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """A connection that leaves this machine fails at once, with the address that was wanted."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(original):
        def checked(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise RuntimeError(f"a test tried to reach {address}: tests run without a network")
            return original(self, address)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(connect))
        patch.setattr(socket.socket, "connect_ex", guard(connect_ex))
        yield


class _Deprecations(logging.Handler):
    """transformers logs most of its deprecations instead of warning, so a warning filter does not see them."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            raise FutureWarning(record.getMessage())


@pytest.fixture(autouse=True, scope="session")
def deprecations_are_errors():
    handler = _Deprecations(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
