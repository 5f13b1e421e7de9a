"""Renders chat templates in a child process, which is started when it is first needed, and kept."""

import atexit
import contextlib
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sborax.adapters.core import SboraxError

SECONDS = 3.0
"""Time limit per conversation. Real templates take less than a thousandth of it."""
STARTING = 60.0
"""Time limit in seconds for the child to start, on a busy machine."""
LONGEST = 1 << 26
"""The most bytes of an answer. JSON takes at most 12 for a letter."""
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")))
KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL", "LC_TIME")
"""Environment variables that the child gets. A template must not see others, such as tokens and keys."""
GIVEN = "{{ [messages, tools, documents] | tojson }}"
"""A template of sborax's that prints the variables which transformers passes to any template."""


class Rendered(NamedTuple):
    """A rendered conversation.

    - text: of the whole conversation.
    - ends: for each cut, the length of that shorter conversation's text; None where `text` does not begin with it.
    - ignored: keys of messages, or "tools", that do not change the text.
    """

    text: str
    ends: list[int | None]
    ignored: list[str]


class Failed(Exception):
    """A rendering failed.

    - refused: whether the template itself refused the conversation.
    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        Exception.__init__(self, reason)
        self.refused = refused


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    generate: bool,
    cuts: Sequence[tuple[int, bool]] = (),
    heeded: Sequence[str] = (),
) -> Rendered:
    """Render a conversation with the tokenizer's chat template. The text equals that of its `apply_chat_template`.

    - generate: whether to append the beginning of an answer.
    - cuts: shorter conversations, each as a number of first messages and a `generate` of its own.
    - heeded: keys of messages, or "tools", to report if the template ignores them.

    Raises Failed if the template fails, or takes too much time or memory.
    """
    try:
        variables = tokenizer.apply_chat_template(list(messages), tools=tools, chat_template=GIVEN, tokenize=False)
        template = tokenizer.get_chat_template(tools=tools)
    except Exception as failure:  # transformers checks its arguments little, so any error may come
        raise Failed(str(failure).partition("\n")[0]) from failure
    messages, tools, documents = json.loads(variables)
    request = {
        "template": template,
        "messages": messages,
        "generate": generate,
        "cuts": cuts,
        "heeded": heeded,
        "variables": {**tokenizer.special_tokens_map, "tools": tools, "documents": documents},
        "seconds": SECONDS,
    }
    answer = _process().ask(request)
    if "reason" in answer:
        raise Failed(answer["reason"], answer.get("refused", False))
    return Rendered(answer["text"], answer["ends"], answer["ignored"])


@functools.cache
def _process() -> "Process":
    process = Process()
    atexit.register(process.end)
    return process


class Process:
    """The child process. It takes one request at a time; a child that is stuck is killed and replaced.

    It is started as a program and never forked, since JAX's threads do not survive a fork.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner, self._lock = 0, threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises Failed if there is none in time."""
        with self._lock:
            child = self._ready()
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                return json.loads(self._line(child, SECONDS, f"it takes more than {SECONDS:g} seconds"))
            except BaseException as failure:
                # Also after an interrupt: otherwise the next request would get this one's answer.
                self._kill()
                if isinstance(failure, OSError):
                    raise Failed("the process that renders it ended") from failure
                raise

    def end(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._kill()

    def _ready(self) -> "subprocess.Popen[bytes]":
        # A forked copy of this process must not use its parent's pipes.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._kill()
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        try:
            self._child = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise SboraxError(f"the process that renders chat templates does not start ({error})") from error
        self._owner = os.getpid()
        try:
            self._line(self._child, STARTING, "")
        except Failed:
            self._kill()
            command = " ".join(COMMAND)
            raise SboraxError(f"the process that renders chat templates does not start; try {command}") from None
        return self._child

    def _line(self, child: "subprocess.Popen[bytes]", seconds: float, late: str) -> bytes:
        """Read a line from the child. Raises Failed with the text `late` after so many seconds."""
        assert child.stdout is not None
        deadline, parts, length = time.monotonic() + seconds, [], 0
        while not (parts and parts[-1].endswith(b"\n")):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([child.stdout], [], [], remaining)[0]:
                raise Failed(late)
            parts.append(os.read(child.stdout.fileno(), 1 << 20))
            length += len(parts[-1])
            if not parts[-1] or length > LONGEST:
                raise Failed("the process that renders it ended")
        return b"".join(parts)

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if self._owner == os.getpid():
            child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        if self._owner == os.getpid():
            child.wait()
