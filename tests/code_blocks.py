"""Runs the code blocks of a page as its reader would: in order, in terminals, against a server.

What a fence says in its first word decides what is done with a block:

- ``console``: the lines after ``$`` are typed into a terminal, whose answers must be those shown.
- ``sh``: a script, which must succeed. ``python``: a program, likewise.
- ``text``: what the script or program before it must have said.
- ``yaml``: settings of a server, which must load. ``json``: must be JSON.

A comment right before the fence says more: ``<!-- file: NAME -->`` stores the block instead of
running it, ``<!-- terminal: NAME -->`` uses another terminal and leaves the command running there
(before ``text``: what that terminal must show by now), ``<!-- not run: REASON -->`` leaves the
block out. A block that none of this fits fails.

Ids, pids and times differ from run to run. Where a page shows one any may come, but a second
mention of an id or pid must be the same again, and what is typed later has that of this run in its
place. A line ``...`` stands for any lines, ``…`` for anything in its line. Ports 8080, 9091 and
9092 become free ones.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

import codeq
from codeq import config

from .conftest import INHERITED

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 60
#: What pages take for granted when they do not start it themselves
SERVE = "codeq serve --dev"
READY = "ready http=127.0.0.1:8080 producer=127.0.0.1:9092 worker=127.0.0.1:9091 pid=99999999"
PORTS = {8080: "HTTP_ADDR", 9092: "PRODUCER_STREAM_ADDR", 9091: "WORKER_STREAM_ADDR"}
NOTES = ("not run", "file", "terminal")
NOTE = re.compile(r"<!-- ([a-z ]+): (.+?) -->", re.DOTALL)
NAME = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=pid=)\d+"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z"
CHANGING = re.compile(rf"(?P<name>{NAME})|(?P<time>{TIME})|(?P<any>…)")
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block. ``note`` is the word of the comment before it, or empty."""

    line: int
    language: str
    text: str
    note: str
    value: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    note = value = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            line = (token.map or [0])[0] + 1
            found.append(Block(line, token.info.strip(), token.content, note, value))
        comment = NOTE.fullmatch(token.content.strip()) if token.type == "html_block" else None
        note, value = comment.groups() if comment and comment[1] in NOTES else ("", "")
    return found


class Known:
    """What the page calls its ids, pids and ports, and what they are in this run."""

    def __init__(self, ports: dict[int, int]) -> None:
        self._names: dict[str, str] = {}
        self._ports = ports

    def typed(self, text: str) -> str:
        """What is shown, with the values of this run."""
        for shown, real in self._names.items():
            text = re.sub(rf"\b{shown}\b", real, text)
        return self._addressed(text).replace(".venv/bin/", "")

    def _addressed(self, text: str) -> str:
        for shown, port in self._ports.items():
            text = re.sub(rf"\b(localhost|127\.0\.0\.1):{shown}\b", rf"\1:{port}", text)
        return text

    def find(self, shown: str, output: str) -> tuple[int, int] | None:
        """Where, in the output, the whole lines that are shown begin and end; None: they are not
        there. Names that are new are remembered."""
        groups: dict[str, str] = {}
        lines = self._addressed(shown).strip().splitlines()
        pattern = "".join(self._pattern(line, groups) for line in lines)
        found = re.search(f"^{pattern}", output, re.MULTILINE)
        if found is None:
            return None
        self._names.update((name, found[group]) for name, group in groups.items())
        return found.span()

    def _pattern(self, line: str, groups: dict[str, str]) -> str:
        if line.strip() == "...":
            return r"(?:.*\n)*?"
        pieces, start = [], 0
        for value in CHANGING.finditer(line):
            pieces += [re.escape(line[start : value.start()]), self._value(value, groups)]
            start = value.end()
        return "".join((*pieces, re.escape(line[start:]), r"[ \t]*\n"))

    def _value(self, value: re.Match[str], groups: dict[str, str]) -> str:
        name = value["name"]
        if name is None:
            return TIME if value["time"] else ".*"
        if name in self._names:
            return re.escape(self._names[name])
        if name in groups:
            return f"(?P={groups[name]})"
        groups[name] = f"name{len(groups)}"
        return f"(?P<{groups[name]}>{NAME})"


class Terminal:
    """A shell that stays, with what it said and nobody has compared yet."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._folder = folder
        self.said = ""
        self._shell = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that close() ends what the shell started, too
        )

    def type(self, command: str) -> None:
        """Starts a command and does not wait for it."""
        assert self._shell.stdin is not None
        step = self._folder / f".step{self._shell.pid}"
        step.write_text(command + "\n")
        self._shell.stdin.write(f". {shlex.quote(str(step))} </dev/null\n".encode())
        self._shell.stdin.flush()

    def run(self, command: str) -> tuple[int, str]:
        """The exit code of a command, and what it said."""
        self.type(command + '\necho "<exit $?>"')
        self.read_until(lambda: "<exit " in self.said and self.said.endswith(">\n"))
        output, _, code = self.said.rpartition("<exit ")
        self.said = ""
        return int(code.partition(">")[0]), output

    def read_until(self, done: Callable[[], bool]) -> None:
        """Reads on until what was said suffices; AssertionError when it does not come."""
        assert self._shell.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._shell.stdout, selectors.EVENT_READ)
            while not done():
                assert selector.select(PATIENCE_SECONDS), f"nothing more came after:\n{self.said}"
                piece = os.read(self._shell.stdout.fileno(), 1 << 16)
                assert piece, f"the terminal closed after:\n{self.said}"
                self.said += piece.decode(errors="replace")

    def close(self) -> None:
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.communicate()


class PageRun:
    """One page in one folder. ``left_out`` are the blocks that were marked so."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.left_out: list[Block] = []
        self._page = page
        self._folder = folder
        ports = free_ports()
        self._known = Known(ports)
        self._environ = environment(folder, ports)
        self._terminals: dict[str, Terminal] = {}
        self._output = ""  # of the last script or program
        for name in ("examples", "proto"):
            (folder / name).symlink_to(ROOT / name)

    def run(self) -> None:
        """Raises AssertionError, with page and line, for the first block that fails."""
        try:
            if SERVE not in self._page.read_text():
                self._stay(SERVE, READY, "server")
            for block in blocks_of(self._page):
                try:
                    self._block(block)
                except (AssertionError, config.ConfigError, ValueError) as error:
                    raise AssertionError(f"{self._page.name}:{block.line}: {error}") from error
        finally:
            for terminal in self._terminals.values():
                terminal.close()

    def _block(self, block: Block) -> None:
        if block.note == "not run":
            self.left_out.append(block)
        elif block.note == "file":
            (self._folder / block.value).write_text(self._known.typed(block.text))
        elif block.language == "console":
            self._console(block)
        elif block.language == "text":
            if block.note == "terminal":
                self._await(block.text, self._terminal(block.value))
            else:
                self._compare(block.text, self._output)
        elif block.language in ("sh", "python"):
            self._program(block)
        elif block.language == "yaml":
            self._settings(block.text)
        elif block.language == "json":
            json.loads(block.text)
        else:
            raise AssertionError("say what this block is, or why it is not run")

    def _console(self, block: Block) -> None:
        steps = COMMAND.findall(block.text)
        assert steps, "a console block begins with a line after $"
        for command, shown in steps:
            typed = self._known.typed(command)
            if block.note == "terminal":
                self._stay(typed, shown, block.value)
                continue
            code, output = self._terminal("").run(typed)
            assert code == 0, f"{command} ended with {code}: {output}"
            if shown.strip() or output.strip():
                self._compare(shown, output)

    def _compare(self, shown: str, output: str) -> None:
        begin, end = self._known.find(shown, output.rstrip() + "\n") or (0, 0)
        rest = output[:begin].strip() or output[end:].strip()
        assert end and not rest, f"it said\n{output}\nnot\n{shown}"

    def _stay(self, command: str, shown: str, name: str) -> None:
        self._terminal(name).type(command)
        self._await(shown, self._terminal(name))

    def _await(self, shown: str, terminal: Terminal) -> None:
        """Until the terminal shows this, which is then past."""
        terminal.read_until(lambda: self._known.find(shown, terminal.said) is not None)
        _, end = self._known.find(shown, terminal.said) or (0, 0)
        terminal.said = terminal.said[end:]

    def _program(self, block: Block) -> None:
        command = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
        done = subprocess.run(
            [*command, "-c", self._known.typed(block.text)],
            cwd=self._folder,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"it ended with {done.returncode}: {done.stderr}"
        self._output = done.stdout

    def _settings(self, text: str) -> None:
        path = self._folder / "page.yaml"
        path.write_text(text)
        config.load(str(path))

    def _terminal(self, name: str) -> Terminal:
        if name not in self._terminals:
            self._terminals[name] = Terminal(self._folder, self._environ)
        return self._terminals[name]


def free_ports() -> dict[int, int]:
    """A free port for each that pages name."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {shown: one.getsockname()[1] for shown, one in zip(PORTS, sockets, strict=True)}


def environment(folder: Path, ports: dict[int, int]) -> dict[str, str]:
    """That of a reader who has codeq in the path, but a server listens on other ports."""
    tools = folder / ".tools"
    tools.mkdir()
    python = shlex.quote(sys.executable)
    settings = [f"{name}=127.0.0.1:{ports[shown]}" for shown, name in PORTS.items()]
    served = " ".join(("LIMITS_DISK_RESERVE_BYTES=0", "LOG_LEVEL=error", *settings))
    scripts = {
        "python": f'exec {python} "$@"',
        "codeq": f'[ "$1" != serve ] || export {served}\nexec {python} -m codeq "$@"',
    }
    for name, script in scripts.items():
        tool = tools / name
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    return {
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(codeq.__file__).resolve().parent.parent),
        "PYTHONUNBUFFERED": "1",
    }
