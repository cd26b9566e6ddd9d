"""What the tests of the export share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export.foreign import modules

from nmoe_export import choice
from nmoe_export.source import of_modules


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(0).integers(0, 256, (80, 3, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="session")
def source(images):
    extractor, gate, experts = modules()
    with torch.no_grad():
        h = extractor(torch.from_numpy(images))
        labels = experts[0](h).argmax(1).numpy()
    return of_modules(extractor, gate, experts, images, labels=labels)


@pytest.fixture(autouse=True)
def int8_is_faster(monkeypatch):
    """Whether it is is the machine's business, which no test may depend on; what follows from it is not."""
    monkeypatch.setattr(choice, "latencies", lambda *_: {"float": 2.0, "written": 1.0})
