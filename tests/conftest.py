import os
import socket

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from tests.tiny import FAMILIES, make_checkpoint


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing in the tests may reach out of this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests have no network, yet something connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny models are slower with more


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """One tiny checkpoint per family, with tokenizer; never written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny(checkpoints):
    return checkpoints["qwen3"]
