"""The process that renders chat templates, as this one sees it: begun when it is first needed, and kept."""

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
"""Of one conversation; a real one takes less than a thousandth."""
STARTING = 60.0
"""Seconds that the process has to begin, on a machine that does other things."""
LONGEST = 1 << 26
"""Bytes of an answer, which has at most 12 for each letter."""
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")))
KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL", "LC_TIME")
"""What the process has of the environment: a template has no business with the rest."""
GIVEN = "{{ [messages, tools, documents] | tojson }}"
"""A template of ours, by which transformers says what it gives to any."""


class Rendered(NamedTuple):
    """The text of a conversation, and where the shorter ones end in it, None for one that it does not begin with."""

    text: str
    ends: list[int | None]
    ignored: list[str]
    """Keys of messages, or "tools", that the template does not look at."""


class Failed(Exception):
    """A rendering without a result. refused: the template itself refuses the conversation."""

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
    """A conversation through the tokenizer's chat template, to the letter what its `apply_chat_template` makes of it.

    generate: whether the text ends with what begins an answer. cuts: for each, so many of the first messages, and
    whether with what begins an answer. heeded: keys of messages, or "tools", of which to tell if they are ignored.
    Raises Failed where the template fails, or takes too much time or memory.
    """
    try:
        given = tokenizer.apply_chat_template(list(messages), tools=tools, chat_template=GIVEN, tokenize=False)
        template = tokenizer.get_chat_template(tools=tools)
    except Exception as failure:  # transformers checks little of what it is given
        raise Failed(str(failure).partition("\n")[0]) from failure
    messages, tools, documents = json.loads(given)
    request = {
        "template": template,
        "messages": messages,
        "generate": generate,
        "cuts": cuts,
        "heeded": heeded,
        "variables": {**tokenizer.special_tokens_map, "tools": tools, "documents": documents},
        "seconds": SECONDS,
    }
    told = _process().ask(request)
    if "reason" in told:
        raise Failed(told["reason"], told.get("refused", False))
    return Rendered(told["text"], told["ends"], told["ignored"])


@functools.cache
def _process() -> "Process":
    made = Process()
    atexit.register(made.end)
    return made


class Process:
    """A child that renders, one request after the other. One that is stuck is ended, and the next request has another.

    It is started as a program, never forked: the threads of JAX would not survive that.
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
                # Interrupted, too: a later request would get this one's answer.
                self._kill()
                if isinstance(failure, OSError):
                    raise Failed("the process that renders it ended") from failure
                raise

    def end(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._kill()

    def _ready(self) -> "subprocess.Popen[bytes]":
        # A fork of this process would share the pipes.
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
        """What the child writes up to the end of a line."""
        assert child.stdout is not None
        until, parts, length = time.monotonic() + seconds, [], 0
        while not (parts and parts[-1].endswith(b"\n")):
            left = until - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
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
