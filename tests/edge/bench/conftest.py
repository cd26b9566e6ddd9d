from __future__ import annotations

import pytest
from edge.bench.records import made_up_record


@pytest.fixture
def record():
    return made_up_record()
