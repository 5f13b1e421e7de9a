"""The child process that renders chat templates, with limits of memory and time: a template is a stranger's program.

Its jinja environment equals that of transformers, which is not imported: that would take seconds, and more memory than
the process may have. It reads requests from standard input and writes answers to standard output, a line of JSON each.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 1 << 29
"""The most bytes of address space."""
LONGEST = 1 << 19
"""The most letters of a rendered conversation, some 130,000 tokens. Tokenising takes up to 450 bytes for each, outside
this process."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark answers. Only the text inside is kept."""

    tags = {"generation"}  # noqa: RUF012  (as jinja has it)

    def parse(self, parser: Any) -> Any:
        """The text between the tags, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


class Dict:
    """`dict`, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  (a namespace may have an entry `self`)
        self, entries = args[0], dict(*args[1:], **kwargs)
        for name in entries:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(16)
def compiled(template: str) -> jinja2.Template:
    """A template compiled in transformers' environment."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": Dict(), "namespace": Namespace}
    return environment.from_string(template)


def render(template: str, messages: Sequence[Any], generate: bool, variables: dict[str, Any]) -> str:
    """The text of a conversation; with `generate`, the beginning of an answer is appended."""
    parts, length = [], 0
    for part in compiled(template).generate(messages=messages, add_generation_prompt=generate, **variables):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise ValueError(f"it writes more than {LONGEST:,} letters")
    return "".join(parts)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: `{"text": ..., "ends": [...], "ignored": [...]}`.

    - text: of the conversation.
    - ends: the length of the text of each shorter conversation in `cuts`; null where the text does not begin with it.
    - ignored: the names in `heeded`, keys of messages or variables, without which the text is the same.
    """
    template, messages, variables = request["template"], request["messages"], request["variables"]
    text, ends = render(template, messages, request["generate"], variables), []
    for count, generate in request["cuts"]:
        part = render(template, messages[:count], generate, variables)
        ends.append(len(part) if text.startswith(part) else None)
    ignored = []
    for name in request["heeded"]:
        bare = [{key: value for key, value in message.items() if key != name} for message in messages]
        fewer = variables | ({name: None} if name in variables else {})
        # A template that fails without the name does not ignore it.
        with contextlib.suppress(Exception):
            if render(template, bare, request["generate"], fewer) == text:
                ignored.append(name)
    return {"text": text, "ends": ends, "ignored": ignored}


def _limit(kind: int, most: int) -> None:
    # Some systems lack some of the limits.
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def serve() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    # The process writes no files.
    _limit(resource.RLIMIT_FSIZE, 0)
    while True:
        # Ends the line of an answer, and at first reports that the process has started.
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            request = json.loads(line)
            usage = resource.getrusage(resource.RUSAGE_SELF)
            # The parent kills a call that takes too long. If the parent is gone, this limit does.
            _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + request["seconds"]) + 2)
            reply = json.dumps(answer(request))
        except MemoryError:
            reply = json.dumps({"reason": f"it needs more than {MEMORY >> 20} MiB"})
        except Exception as failure:  # a template may raise anything
            reason = str(failure).partition("\n")[0][:1_000]
            # A template's own `raise_exception` raises exactly this class, jinja's errors are subclasses.
            reply = json.dumps({"reason": reason, "refused": type(failure) is jinja2.TemplateError})
        sys.stdout.buffer.write(reply.encode())


if __name__ == "__main__":
    serve()
