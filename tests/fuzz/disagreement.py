"""Whether the extensions read bytes as the generated protobuf classes and Python's json do."""

from __future__ import annotations

from codeq.engine import _wire
from tests.test_text import json_valid_by_python
from tests.wire_oracle import OURS, PROTOBUF


def disagree(target: str, data: bytes) -> bool:
    """Always False for targets that nothing else can read."""
    if target in OURS:
        return OURS[target](data) != PROTOBUF[target](data)
    return target == "text" and _wire.json_valid(data) != json_valid_by_python(data)
