"""Is in sdist and wheel what belongs there, and nothing else?

    python -m tests.package FOLDER

FOLDER holds one of each, made from this tree.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import codeq

ROOT = Path(__file__).resolve().parent.parent
#: files of the wheel beside Python modules, by their ends
TYPES = ("py.typed", ".pyi")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def names_of_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.partition("/")[2] for name in files}


def tracked() -> set[str]:
    """Every file of the repository; empty when this tree is none."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def wanted_in_wheel() -> set[str]:
    """Modules, types and pages of the tree; extensions have the end of this Python."""
    found = set()
    for path in (ROOT / "codeq").rglob("*"):
        inside_ui = "ui" in path.relative_to(ROOT).parts
        if path.is_file() and (path.name.endswith((".py", *TYPES)) or inside_ui):
            found.add(path.relative_to(ROOT).as_posix())
    return found


def check_sdist(path: Path) -> int:
    there = names_of_sdist(path)
    missing = tracked() - there
    assert not missing, f"not in the sdist: {sorted(missing)}"
    built = {name for name in there if name.endswith((".so", ".pyc"))}
    built |= {name for name in there if name.startswith("codeq/") and name.endswith(".c")}
    assert not built, f"in the sdist, but made by a build: {sorted(built)}"
    return len(there)


def check_wheel(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        there = set(archive.namelist())
        info = next(name for name in there if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(info))
    meta = {name for name in there if ".dist-info/" in name}
    assert any(name.endswith("/licenses/LICENSE") for name in meta)
    extensions = {name for name in there if name.endswith(".so")}
    sources = sorted((ROOT / "codeq/engine").glob("*.pyx"))
    stems = sorted(Path(name).name.partition(".")[0] for name in extensions)
    assert stems == [source.stem for source in sources], stems
    assert all(name.startswith("codeq/engine/") for name in extensions)
    rest = there - meta - extensions
    wanted = wanted_in_wheel()
    assert rest == wanted, f"missing {sorted(wanted - rest)}, too much {sorted(rest - wanted)}"
    check_metadata(metadata)
    return len(there)


def check_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "codeq" and metadata["Version"] == codeq.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# codeq")


def main() -> None:
    folder = Path(sys.argv[1])
    sdist = check_sdist(only(folder, "*.tar.gz"))
    wheel = check_wheel(only(folder, "*.whl"))
    print(f"sdist: {sdist} files, wheel: {wheel} files, as they should be")


main()
