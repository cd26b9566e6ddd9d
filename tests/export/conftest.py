"""What the tests of the export share."""

from __future__ import annotations

import pytest
import torch
from export.foreign import modules, pictures

from nmoe_export import choice
from nmoe_export.source import of_modules


@pytest.fixture(scope="session")
def images():
    return pictures()


@pytest.fixture(scope="session")
def source(images):
    """What the fleet itself answers is right, so that float is right always."""
    extractor, gate, experts = modules()
    with torch.no_grad():
        h = extractor(torch.from_numpy(images))
        said = torch.stack([expert(h) for expert in experts], 1)
        labels = said[torch.arange(len(h)), gate(h).argmax(1)].argmax(1).numpy()
    return of_modules(extractor, gate, experts, images, labels=labels)


@pytest.fixture(autouse=True)
def int8_is_faster(monkeypatch):
    """Whether it is is the machine's business, which no test may depend on; what follows from it is not."""
    monkeypatch.setattr(choice, "latencies", lambda *_: {"float": 2.0, "written": 1.0})
