"""Arguments of the command line, and what becomes of errors. The work is imported by the command that needs it."""

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import sborax
from sborax.adapters.core import SboraxError
from sborax.cli import launcher
from sborax.config.classes import import_source
from sborax.config.terminal import say
from sborax.errors import is_panic

Command = Callable[[argparse.Namespace], int]

OK, WRONG, INTERRUPTED = 0, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise SboraxError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code: 0, 2 after one line `error: ...` on stderr, 130 after Ctrl-C, 3 if a peer dies."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Into a file or a pipe, too, what a run tells appears when it is told.
        sys.stdout.reconfigure(line_buffering=True)
    # transformers, which lends its tokenizers alone, would say that there is no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        arguments = _parse(argv)
        arguments.argv = argv
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would say so again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (SboraxError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {_one_line(error)}", file=sys.stderr)
        return WRONG
    except BaseException as error:
        # A tokenizer is a library in Rust, and its patterns may be anybody's.
        if not is_panic(error) or "--debug" in argv:
            raise
        say(f"error: a library gave up ({_one_line(error)}); --debug shows where", file=sys.stderr)
        return WRONG
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    # Names out of a file may hold what a terminal obeys.
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments, rest = _parser().parse_known_args(argv)
    # argparse gives up on `key=value` that follows an option.
    changes = [word for word in rest if not word.startswith("-")]
    if len(changes) < len(rest) or (changes and "changes" not in arguments):
        unknown = next(word for word in rest if word.startswith("-") or "changes" not in arguments)
        raise SboraxError(f"unknown argument {unknown}; see sborax {arguments.command} --help")
    if changes:
        arguments.changes += changes
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("sborax", description="Fine-tune LLaMA-family language models in JAX, a few weights at a time.")
    parser.add_argument("--version", action="version", version=f"sborax {sborax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Command, says: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        own.add_argument("--debug", action="store_true", help="print a traceback with an error")
        own.add_argument(
            "--import", dest="imports", action="append", default=[], metavar="MODULE",
            help="a module, or the path of a .py file, with classes of your own; repeat for several",
        )  # fmt: skip
        own.set_defaults(run=run)
        return own

    def add_changes(own: argparse.ArgumentParser) -> None:
        own.add_argument(
            "changes", metavar="key=value", nargs="*", default=[], help="change a field, such as optimizer.lr=1e-4"
        )

    def add_mesh(own: argparse.ArgumentParser, says: str = "lay it out over devices, such as fsdp=8,tensor=2") -> None:
        own.add_argument("--mesh", metavar="AXIS=N,...", help=says)

    train = command("train", _train, "fine-tune a model as an experiment says")
    train.add_argument("experiment", help="Python file with `def experiment()`, or the config.json of an earlier run")
    add_changes(train)
    add_mesh(train)
    train.add_argument("--out", metavar="RUN_DIR", help="where the run goes (default: runs/NAME OF THE EXPERIMENT)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN_DIR")
    train.add_argument("--profile", action="store_true", help="write an xprof trace of a few steps to RUN_DIR/profile")
    train.add_argument(
        "--compile-cache", metavar="DIR", help="keep compiled programs there (default: $JAX_COMPILATION_CACHE_DIR)"
    )

    launcher.add_arguments(train)

    sweep = command("sweep", _importing(_sweep), "train several adapters at once over one base")
    sweep.add_argument("experiment", help="Python file with `def experiment()`, or the config.json of an earlier run")
    sweep.add_argument(
        "changes", metavar="key=value[,value]", nargs="*", default=[],
        help="values to train with, such as optimizer.lr=1e-4,3e-4 seed_adapter=0,1: every combination is a member",
    )  # fmt: skip
    # Refused in one line, as `mesh=` is.
    add_mesh(sweep, argparse.SUPPRESS)
    sweep.add_argument("--out", metavar="DIR", help="where the runs go (default: runs/NAME OF THE EXPERIMENT-sweep)")
    sweep.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    sweep.add_argument(
        "--at-once", type=int, metavar="N", help="members computed together (default: 1 on a CPU, else all)"
    )

    generate = command("generate", _importing(_generate), "write text with a model or a run")
    _add_target(generate)
    generate.add_argument("--prompt", action="append", help="text to go on from; repeat for several")
    generate.add_argument("--chat", action="store_true", help="answer every line of standard input, as a conversation")
    generate.add_argument("--system", metavar="TEXT", help="what a conversation begins with")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end each text before TEXT; repeat for several"
    )
    generate.add_argument("--template", help="wrap the prompt: chat, alpaca, or text with {instruction} in it")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest P of mass")
    add_mesh(generate)
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")

    score = command("eval", _importing(_eval), "score a model or a run on tasks")
    _add_target(score)
    score.add_argument("--tasks", default="", metavar="A,B", help="names of tasks, as `sborax tasks` lists them")
    score.add_argument("--harness", default="", metavar="A,B", help="names of tasks of lm-evaluation-harness")
    score.add_argument("--include", metavar="DIR", help="where tasks of your own for the harness are, as YAML")
    score.add_argument("--limit", type=int, metavar="N", help="score N items of each task, drawn with the seed")
    score.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    score.add_argument("--out", metavar="DIR", help="scores.json and a JSONL file a task (default: runs/eval-TARGET)")
    score.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help="a task's data: path or hub id")
    score.add_argument("--template", help="prompt around instructions: alpaca, chat, or text with {instruction} in it")
    score.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="of a forward pass (default: 4096)")
    score.add_argument(
        "--mesh", nargs="+", default=[], metavar="AXIS=N,...", help="lay it out over devices, such as fsdp=8,tensor=2"
    )

    command("tasks", _importing(_tasks), "list what `sborax eval --tasks` takes")

    compare = command("compare", _importing(_compare), "compare runs and sweeps in one report, with intervals")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="directories of runs or sweeps, the reference first")
    compare.add_argument("--by", default="method", metavar="KEY,...", help="what differs: method, or keys of a config")
    compare.add_argument("--base", metavar="DIR", help="scores of the base by `sborax eval`: what runs forgot")
    compare.add_argument("--spectra", action="store_true", help="also load base and adapters: what training changed")
    compare.add_argument("--out", default="runs/compare", metavar="DIR", help="for the report (default: runs/compare)")

    merge = command("merge", _importing(_merge), "write a run, or several adapters with weights, as a dense model")
    merge.add_argument("target", metavar="RUN_DIR", help="a run (its weight is 1), or with --add a model without any")
    merge.add_argument("out_dir", metavar="OUT_DIR")
    merge.add_argument(
        "--add", action="append", default=[], metavar="NAME=WEIGHT",
        help="also add a run's or a PEFT adapter's change of the base, so many times; repeat for several",
    )  # fmt: skip
    merge.add_argument(
        "--approximate", choices=("inputs", "weights"),
        help="merge ResLoRA's input and middle shortcuts, which no weight equals, and print the error on its data",
    )  # fmt: skip

    slim = command("slim", _importing(_slim), "write a run of LoRAPrune as a smaller dense model, with its perplexity")
    slim.add_argument("run_dir", metavar="RUN_DIR")
    slim.add_argument("out_dir", metavar="OUT_DIR")

    export = command("export", _importing(_export), "write a run's adapter in PEFT's format")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out_dir", metavar="OUT_DIR")
    export.add_argument(
        "--as", dest="form", choices=("native", "lora"), default="native",
        help="native (default): as PEFT's own kind where PEFT has the method; lora: as plain LoRA, which is exact "
        "where the change has thin factors, and else truncated, with the error printed",
    )  # fmt: skip
    export.add_argument("--rank", type=int, metavar="R", help="of what --as lora truncates (default: the method's own)")

    plan = command("plan", _importing(_plan), "show what would be trained, without reading weights")
    plan.add_argument("target", metavar="EXPERIMENT|MODEL")
    add_changes(plan)
    add_mesh(plan, "lay it out over devices, here or not: fsdp=8,tensor=2")
    plan.add_argument("--topology", metavar="NAME", help="compile the step for a TPU slice, here or not: v5e:16x16")
    plan.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: the longest of the data)")

    methods = command("methods", _importing(_methods), "list the methods, or tell all about one")
    methods.add_argument("name", metavar="NAME", nargs="?")

    quickstart = command("quickstart", _importing(_quickstart), "fine-tune SmolLM2-135M with SBoRA in a few minutes")
    add_changes(quickstart)
    quickstart.add_argument("--out", metavar="RUN_DIR", help="where the run goes (default: runs/quickstart)")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="Hugging Face directory, hub id, .gguf file, or RUN_DIR")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter directory to put on top")


def _importing(run: Command) -> Command:
    """The command behind the modules that `--import` names."""

    def command(arguments: argparse.Namespace) -> int:
        for source in arguments.imports:
            import_source(source)
        return run(arguments)

    return command


def _train(arguments: argparse.Namespace) -> int:
    if launcher.is_several(arguments):
        if launcher.INSIDE not in os.environ:
            return launcher.watch(arguments.argv)
        from sborax.layout.hosts import join

        join(arguments.coordinator, arguments.processes, arguments.process, arguments.heartbeat)
    from sborax.cli.commands import train

    # A run that is asked to stop saves itself first.
    return OK if train(arguments) else INTERRUPTED


def _sweep(arguments: argparse.Namespace) -> int:
    from sborax.cli.layout import with_mesh
    from sborax.cli.sweep import sweep

    changes = with_mesh(arguments.changes, arguments.mesh)
    words = arguments.experiment, changes, arguments.out, arguments.resume, arguments.at_once
    return OK if sweep(*words, imports=arguments.imports) else INTERRUPTED


def _generate(arguments: argparse.Namespace) -> int:
    if not arguments.chat and not arguments.prompt:
        raise SboraxError("the following arguments are required: --prompt or --chat; see sborax generate --help")
    if arguments.chat and (arguments.prompt or arguments.template):
        raise SboraxError("--chat reads its turns from standard input; leave --prompt and --template out")
    if arguments.system is not None and not arguments.chat:
        raise SboraxError("--system begins a conversation; give --chat")
    if "" in arguments.stop:
        raise SboraxError("--stop '': every text holds the empty string; give what ends a text, or leave it out")
    from sborax.cli.chat import chat, generate

    if arguments.chat:
        chat(arguments)
    else:
        generate(arguments)
    return OK


def _eval(arguments: argparse.Namespace) -> int:
    from sborax.cli.evaluate import score

    score(arguments)
    return OK


def _tasks(arguments: argparse.Namespace) -> int:
    from sborax.cli.evaluate import tasks

    say(tasks())
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    from sborax.cli.compare import compare

    compare(arguments.runs, arguments.by, arguments.out, arguments.spectra, arguments.base)
    return OK


def _merge(arguments: argparse.Namespace) -> int:
    from sborax.cli.merging import merge

    merge(arguments.target, arguments.out_dir, arguments.approximate, arguments.add)
    return OK


def _slim(arguments: argparse.Namespace) -> int:
    from sborax.cli.commands import slim

    slim(arguments.run_dir, arguments.out_dir)
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from sborax.cli.commands import export

    export(arguments.run_dir, arguments.out_dir, arguments.form, arguments.rank)
    return OK


def _plan(arguments: argparse.Namespace) -> int:
    from sborax.cli.plan import show

    say(show(arguments.target, arguments.changes, arguments.mesh, arguments.topology, arguments.length))
    return OK


def _methods(arguments: argparse.Namespace) -> int:
    from sborax.cli.methods import describe, overview

    say(overview() if arguments.name is None else describe(arguments.name))
    return OK


def _quickstart(arguments: argparse.Namespace) -> int:
    from sborax.cli.quickstart import quickstart

    return OK if quickstart(arguments.changes, arguments.out) else INTERRUPTED
