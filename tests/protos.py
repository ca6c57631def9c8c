"""The classes that protobuf's own compiler makes of proto/*.proto, made when first imported."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def _generate(name: str, folder: str) -> Any:
    wellknown = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        ["protoc", f"-I{ROOT / 'proto'}", f"-I{wellknown}", f"--python_out={folder}", name]
    )
    assert code == 0, f"protoc refused proto/{name}"
    return importlib.import_module(Path(name).stem + "_pb2")


with tempfile.TemporaryDirectory() as _folder:
    sys.path.insert(0, _folder)
    try:
        producerpb = _generate("producer.proto", _folder)
        workerpb = _generate("worker.proto", _folder)
    finally:
        sys.path.remove(_folder)
