"""The rules of the house: who may import whom, what may stand where, how long it may be.

Each message says what to write instead. A rule that is wrong is changed here, with the reason.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 800
HEADER_LINES_MAX = 1000  # csrc has one header, with the contract of every function
FUNCTION_LINES_MAX = 70
OBVIOUS_LINES_MAX = 15  # a C helper up to here may go without a comment
CI_LINES_MAX = 30
LINE_CHARS_MAX = 100

# Who may import which modules of codeq; the longest prefix that fits the importer counts.
LAYERS: dict[str, tuple[str, ...]] = {
    "codeq": ("codeq.errors", "codeq.model", "codeq.client"),
    "codeq.__main__": ("codeq.cli",),
    "codeq.errors": (),
    "codeq.model": ("codeq.errors",),
    "codeq.config": ("codeq.errors", "codeq.model"),
    "codeq.engine": ("codeq.errors", "codeq.model", "codeq.engine"),
    "codeq.engine.clock": ("codeq.errors", "codeq.model"),
    "codeq.server": (
        "codeq.errors", "codeq.model", "codeq.config", "codeq.engine", "codeq.server",
        "codeq.__version__",
    ),
    "codeq.client": (
        "codeq.errors", "codeq.model", "codeq.engine._client", "codeq.engine._wire",
        "codeq.client",
    ),
    "codeq.bench": (
        "codeq.errors", "codeq.model", "codeq.config", "codeq.client", "codeq.bench",
    ),
    "codeq.demo": ("codeq.errors", "codeq.model", "codeq.client"),
    "codeq.sync": ("codeq.errors", "codeq.model", "codeq.client", "codeq.engine._client"),
    "codeq.testing": (
        "codeq.errors", "codeq.model", "codeq.config", "codeq.engine.clock", "codeq.server",
        "codeq.client",
    ),
    "codeq.tokens": ("codeq.errors", "codeq.model"),
    "codeq.cli": (
        "codeq.errors", "codeq.model", "codeq.config", "codeq.server", "codeq.client",
        "codeq.bench", "codeq.demo", "codeq.maintenance", "codeq.tokens",
        "codeq.__version__", "codeq.cli",
    ),
    "codeq.maintenance": (
        "codeq.errors", "codeq.model", "codeq.engine.backup", "codeq.engine.check",
        "codeq.engine.clock",
    ),
}  # fmt: skip
# Rooms that nobody but the named importers may enter.
CLOSED: dict[str, tuple[str, ...]] = {
    "codeq.engine._engine": ("codeq.engine",),
    "codeq.engine.journal": ("codeq.engine",),
    "codeq.engine.store": ("codeq.engine",),
}
# Each third-party package has one home.
HOMES: dict[str, tuple[str, ...]] = {
    "rocksdict": ("codeq.engine.store",),
    "granian": ("codeq.server.http_server",),
    "uvloop": ("codeq.server.app", "codeq.bench.clients"),
    "grpc": ("codeq.server.grpc_server", "codeq.client"),
    "jwt": ("codeq.server.jwks", "codeq.tokens"),
    "cryptography": ("codeq.tokens",),
    "prometheus_client": ("codeq.server.metrics", "codeq.bench.target"),
    "hdrh": ("codeq.bench",),
    "asyncpg": ("codeq.bench.peers",),
    "redis": ("codeq.bench.peers",),
    "matplotlib": ("codeq.bench.report",),
    "opentelemetry": ("codeq.server.tracing",),
    "httpx": ("codeq.server.jwks", "codeq.client.http"),
    "aiohttp": ("codeq.server.callbacks",),
    "yarl": ("codeq.server.callbacks",),
    "yaml": ("codeq.config", "codeq.cli.profiles"),
    "typer": ("codeq.cli",),
    "rich": ("codeq.cli", "codeq.demo", "codeq.bench"),
    "msgspec": ("codeq",),
    "asyncio": (
        "codeq.server",
        "codeq.client",
        "codeq.cli",
        "codeq.demo",
        "codeq.bench",
        "codeq.sync",
        "codeq.testing",
    ),
}
# Traps and invariants this release must have a test for, by number in the test's name.
TRAPS = (
    4, 6, 7, 8, 10, 12, 13, 14, 15, 17, 18, 19, 22, 23, 24, 25, 26, 28, 29, 30, 31, 32, 33, 35, 36,
    37, 38, 40, 41, 42, 43, 46, 49, 50, 52, 53, 57, 59, 62, 63, 64, 65,
)  # fmt: skip
INVARIANTS = range(1, 9)


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def python_files() -> list[Path]:
    folders = ("codeq", "tests", "benches", "examples")
    return files("setup.py", *(f"{folder}/**/*.py" for folder in folders))


def source_files() -> list[Path]:
    return [
        *python_files(),
        *files("codeq/**/*.py[ix]", "codeq/**/*.pxd", "codeq/server/ui/*"),
        *files("csrc/*", "proto/*", "ci/*", ".ci/*"),
    ]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(who: str, prefixes: tuple[str, ...]) -> bool:
    return any(who == prefix or who.startswith(prefix + ".") for prefix in prefixes)


def layer(who: str) -> tuple[str, ...]:
    while who not in LAYERS:
        who = who.rpartition(".")[0]
    return LAYERS[who]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; ``from a import b`` gives ``a.b`` when that is a module."""
    if path.suffix in (".pyx", ".pxd"):
        yield from cython_imports(path)
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{name(path)}:{node.lineno}: write the full name of the module"
            yield from ((node.lineno, resolved(base, alias.name)) for alias in node.names)


def cython_imports(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r"\s*(?:from\s+([\w.]+)\s+)?c?import\s+([\w., ]+)", line)
        if found:
            base, what = found.groups()
            for item in what.split(","):
                word = item.split(" as ")[0].strip()
                yield number, resolved(base, word) if base else word


def resolved(base: str, word: str) -> str:
    inner = ROOT.joinpath(*base.split("."), word)
    there = inner.is_dir() or any(inner.with_suffix(end).exists() for end in (".py", ".pyi"))
    return f"{base}.{word}" if there or base == "codeq" else base


def ours() -> list[Path]:
    return files("codeq/**/*.py", "codeq/**/*.pyx", "codeq/**/*.pxd")


def report(bad: list[str], instead: str) -> None:
    assert not bad, f"{instead}:\n  " + "\n  ".join(bad)


def test_imports_go_downwards_only() -> None:
    bad = [
        f"{name(path)}:{line}: {module(path)} imports {what}"
        for path in ours()
        for line, what in imports(path)
        if within(what, ("codeq",)) and not within(what, layer(module(path)))
    ]
    report(bad, "import only from the layers below (LAYERS in this file), or pass the thing in")


def test_edges_call_the_shard_and_nothing_behind_it() -> None:
    bad = [
        f"{name(path)}:{line}: {module(path)} imports {what}"
        for path in ours()
        for line, what in imports(path)
        for room, allowed in CLOSED.items()
        if within(what, (room,)) and not within(module(path), allowed)
    ]
    report(bad, "call codeq.engine.shard; what an edge needs of the engine room it hands out")


def test_third_party_packages_have_one_home() -> None:
    bad = []
    for path in ours():
        for line, what in imports(path):
            top = what.partition(".")[0]
            if top in HOMES:
                if not within(module(path), HOMES[top]):
                    bad.append(f"{name(path)}:{line}: {top} belongs to {', '.join(HOMES[top])}")
            elif top not in ("codeq", "cython", "cpython", "libc", *sys.stdlib_module_names):
                bad.append(f"{name(path)}:{line}: {top} has no home; add it to HOMES and pyproject")
    report(bad, "ask the home of the package for what you need")


def test_the_engine_room_reads_no_clock_and_no_dice() -> None:
    banned = ("time", "random", "secrets", "uuid", "select", "selectors", "asyncio", "http", "ssl")
    bad = [
        f"{name(path)}:{line}: {what}"
        for path in ours()
        if within(module(path), ("codeq.engine",)) and module(path) != "codeq.engine.clock"
        for line, what in imports(path)
        if what.partition(".")[0] in banned
    ]
    report(bad, "take now_ms and seeds as arguments, or ask codeq.engine.clock")


def test_no_drawer_for_odds_and_ends() -> None:
    banned = {"util", "utils", "helper", "helpers", "common", "misc", "services", "manager"}
    bad = [
        name(path)
        for path in source_files()
        if banned & {part.split(".")[0] for part in path.relative_to(ROOT).parts}
    ]
    report(bad, "name the file after the thing it holds")


def test_files_are_short() -> None:
    bad = []
    for path in source_files():
        count = len(path.read_bytes().splitlines())
        if count > (HEADER_LINES_MAX if path.suffix == ".h" else FILE_LINES_MAX):
            bad.append(f"{name(path)}: {count} lines")
    report(bad, f"split the file by its nouns; {FILE_LINES_MAX} lines at most")


def test_functions_are_short() -> None:
    bad = [
        f"{name(path)}:{line}: {what} has {count} lines"
        for path in source_files()
        for line, what, count in functions(path)
        if count > FUNCTION_LINES_MAX
    ]
    report(bad, f"give the parts of the function names; {FUNCTION_LINES_MAX} lines at most")


def functions(path: Path) -> Iterator[tuple[int, str, int]]:
    """(first line, name, number of lines) of each function in a Python, Cython or C file."""
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1
    elif path.suffix == ".pyx":
        yield from cython_functions(path.read_text().splitlines())
    elif path.suffix in (".c", ".h"):
        yield from c_functions(path.read_text().splitlines())


def cython_functions(lines: list[str]) -> Iterator[tuple[int, str, int]]:
    heading = re.compile(r"(\s*)(?:async\s+)?(?:def|cdef|cpdef)\b[^=]*?(\w+)\s*\(")
    for start, line in enumerate(lines):
        found = heading.match(line)
        if not found or line.lstrip().startswith("cdef class"):
            continue
        depth = len(found.group(1))
        end, body = start, False
        for index in range(start, len(lines)):
            text = lines[index]
            if not text.strip():
                continue
            if body and len(text) - len(text.lstrip()) <= depth:
                break
            body = body or text.split("#")[0].rstrip().endswith(":")
            end = index
            if not body and "(" not in line:
                break
        yield start + 1, found.group(2), end - start + 1


def c_functions(lines: list[str]) -> Iterator[tuple[int, str, int]]:
    """A function is text at the margin with a parenthesis that ends in an opening brace."""
    start = None
    for index, line in enumerate(lines):
        if re.match(r"[A-Za-z_]", line) and not line.endswith((";", ":")):
            start = index
        if line.startswith("}") and start is not None:
            head = " ".join(lines[start : index + 1]).split("{")[0]
            head = re.sub(r"__attribute__\(\(.*?\)\)", "", head)
            found = re.search(r"(\w+)\s*\(", head)
            if found and not re.match(r"(typedef|struct|enum|union)\b[^(]*$", head):
                yield start + 1, found.group(1), index - start + 1
            start = None


def test_lines_are_short() -> None:
    bad = [
        f"{name(path)}:{number}: {len(line)} characters"
        for path in source_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LINE_CHARS_MAX
    ]
    report(bad, f"break the line; {LINE_CHARS_MAX} characters at most")


def found_lines(paths: list[Path], pattern: str) -> list[str]:
    look = re.compile(pattern)
    return [
        f"{name(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if look.search(line)
    ]


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"^\s*cpdef\b", "write def outside and cdef inside"),
        (r"^\s*DEF\s", "use a cdef enum or a constant of codeq.h"),
        (r"^\s*include\s+[\"']", "write a module and cimport it"),
        (r"^\s*#\s*cython:", "set directives once, in setup.py"),
    ],
)
def test_cython_bans(pattern: str, instead: str) -> None:
    report(found_lines(files("codeq/**/*.pyx", "codeq/**/*.pxd"), pattern), instead)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"(?<![\w_])assert\s*\(|assert\.h", "use CQ_ASSERT; Python builds turn assert() off"),
        (r"Python\.h", "keep Python out of csrc; the .pyx turns objects into pointer and length"),
        (r"#\s*include\s+<(?!(std\w+|string|limits|inttypes|\w*intrin|arm_acle|math)\.h>)",
         "no I/O and no clock in csrc; take what you need as an argument"),
        (r"\b(fopen|fwrite|fread|clock_gettime|gettimeofday|time|getrandom|rand|random)\(",
         "no I/O, no clock and no dice in csrc; take what you need as an argument"),
        (r"^(?!.*\bconst\b)(?!typedef|struct \w+ \{|enum)"
         r"\w[\w\s\*]*\s\*?\w+(\[[^(]*\])*\s*(=[^=]|;)",
         "no globals that change; put the state into a struct that the caller owns"),
        (r"\b(sprintf|strcpy|strcat|gets|alloca)\s*\(", "use the form that knows its room"),
    ],
)  # fmt: skip
def test_c_bans(pattern: str, instead: str) -> None:
    report(found_lines(files("csrc/*.c"), pattern), instead)


def test_csrc_has_one_header() -> None:
    assert [name(path) for path in files("csrc/*.h")] == ["csrc/codeq.h"], "put it into codeq.h"


def test_names_and_contracts_of_c_functions() -> None:
    """What codeq.h declares begins with cq_, helpers of one file do not; both say what they do."""
    bad = []
    for path in files("csrc/*.c"):
        lines = path.read_text().splitlines()
        for line, what, count in c_functions(lines):
            head, before = " ".join(lines[line - 1 : line + 1]), lines[line - 2].rstrip()
            if re.search(r"\bstatic\b", head):
                if what.startswith("cq_"):
                    bad.append(f"{name(path)}:{line}: static {what}: drop the prefix")
                if count > OBVIOUS_LINES_MAX and not before.endswith("*/"):
                    bad.append(f"{name(path)}:{line}: {what}: say before it what it returns when")
            elif not what.startswith("cq_"):
                bad.append(f"{name(path)}:{line}: {what}: make it static or give it the prefix cq_")
            elif not re.search(rf"\b{what}\(", header()):
                bad.append(f"{name(path)}:{line}: {what}: declare and describe it in codeq.h")
    report(bad, "name and describe the function")


def test_nothing_is_left_over() -> None:
    words = "|".join(("FIX" + "ME", "TO" + "DO", "XX" + "X", "HA" + "CK", r"breakpoint\(\)"))
    report(found_lines([*source_files(), *documents()], rf"\b({words})"), "do it, or leave it out")


def documents() -> list[Path]:
    found = files("*.md", "*.toml", "MANIFEST.in", "docs/**/*", "examples/**/*")
    return [path for path in found if path.suffix != ".png"]


def test_no_word_of_the_place_where_it_was_written() -> None:
    """Nobody else has these folders and papers, so a reader could not follow the hint."""
    paths = ("/wo" + "rk/", "/ro" + "ot/", "/tm" + "p/", "/ho" + r"me/\w")
    papers = (r"\b(contract|design|targets|examples)\." + "md", r"\bseed\." + "txt")
    talk = ("(contract|design) sec" + "tion", r"\bissue" + r"s? #?\d", r"\bthe issue" + r"\b")
    hosts = (r"pypi\." + "org", "pythonhosted" + r"\.org")
    words = "|".join((*paths, *papers, *talk, *hosts))
    bad = found_lines([*source_files(), *documents()], f"({words})")
    report(bad, "say the thing itself instead of where it was said")


def test_ci_scripts_are_short_and_runnable_by_hand() -> None:
    bad = []
    for path in files("ci/*", ".ci/*"):
        lines = path.read_text().splitlines()
        if len(lines) > CI_LINES_MAX:
            bad.append(f"{name(path)}: {len(lines)} lines; {CI_LINES_MAX} at most")
        if lines[0] != "#!/usr/bin/env bash" or not path.stat().st_mode & 0o100:
            bad.append(f"{name(path)}: begin with #!/usr/bin/env bash and chmod +x")
        if not lines[1].startswith("# "):
            bad.append(f"{name(path)}: say in the second line what it does")
    wanted = {
        "all",
        "lint",
        "test",
        "debug",
        "sanitize",
        "crash",
        "soak",
        "bench",
        "demo",
        "package",
        "ui",
    }
    bad.extend(f"ci/{word}: missing" for word in wanted - {path.name for path in files("ci/*")})
    report(bad, "keep ci/* short")


def test_refusal_numbers_agree() -> None:
    """csrc/codeq.h, codeq/errors.py and the built extension carry the same cq_code numbers."""
    from codeq import errors  # here, so that the other rules can be checked without a build
    from codeq.engine import _wire

    body = re.search(r"typedef enum cq_code \{(.*?)\} cq_code;", header(), re.DOTALL)
    assert body, "csrc/codeq.h: keep `typedef enum cq_code { ... } cq_code;`"
    in_header = {word: int(value) for word, value in re.findall(r"CQ_(\w+) = (\d+)", body.group(1))}
    in_table = {
        word: row.number
        for word, row in vars(errors).items()
        if isinstance(row, errors.Refusal) and row.number is not None
    }
    outside = {word: value for word, value in in_header.items() if 0 < value < 100}
    assert outside == in_table, "give the refusal the same name and number in codeq.h and errors.py"
    assert in_header == _wire.CODES, "build again, or let _wire.CODES list every cq_code"
    assert in_header["OK"] == errors.OK


def header() -> str:
    return (ROOT / "csrc/codeq.h").read_text()


def test_no_test_sleeps() -> None:
    bad = []
    for path in files("tests/**/*.py", "benches/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and sleeps(node):
                bad.append(f"{name(path)}:{node.lineno}: {ast.unparse(node)}")
    report(bad, "move the fake clock, or wait on an event, a pipe or an answer with a timeout")


def sleeps(call: ast.Call) -> bool:
    target = ast.unparse(call.func)
    if target == "asyncio.sleep":
        return not (isinstance(call.args[0], ast.Constant) and call.args[0].value == 0)
    return target in ("time.sleep", "sleep")


def names_of_tests() -> set[str]:
    found = set()
    for path in files("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
    return {what for what in found if what.lower().startswith("test")}


@pytest.mark.parametrize(("letter", "numbers"), [("T", TRAPS), ("I", INVARIANTS)])
def test_each_number_has_a_test_named_for_it(letter: str, numbers: Sequence[int]) -> None:
    parts = {part for what in names_of_tests() for part in what.split("_")}
    missing = [f"{letter}{number}" for number in numbers if f"{letter}{number}" not in parts]
    report(missing, f"write a test named test_{letter}<number>_what_must_hold")
