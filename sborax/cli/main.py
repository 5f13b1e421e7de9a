"""Parses the command line and prints errors. Each command imports its work when it runs."""

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import sborax
from sborax.cli import launcher
from sborax.cli.cache import keep_programs
from sborax.config.classes import import_source
from sborax.config.terminal import say
from sborax.errors import SboraxError, is_panic

Command = Callable[[argparse.Namespace], int]
Commands = argparse._SubParsersAction

OK, WRONG, INTERRUPTED = 0, 2, 130
EXPERIMENT = "Python file with `def experiment()`, or the config.json of an earlier run"
MESH = "axes of the device mesh, such as fsdp=8,tensor=2"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all of sborax's are."""

    def error(self, message: str) -> NoReturn:
        raise SboraxError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code: 0, 2 after one line `error: ...` on stderr, 130 after Ctrl-C, 3 if a peer dies."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A line appears at once, in a file or a pipe too.
        sys.stdout.reconfigure(line_buffering=True)
    # Silences transformers' "no PyTorch" warning; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        arguments = _parse(argv)
        arguments.argv = argv
        keep_programs()
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone. Without this, Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (SboraxError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {_one_line(error)}", file=sys.stderr)
        return WRONG
    except BaseException as error:
        # Tokenizers are written in Rust and may panic on a pattern from a stranger's file.
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
    # Names from a file may contain control characters that a terminal obeys.
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments, words = make_parser().parse_known_args(argv)
    # argparse leaves a `key=value` that follows an option unparsed.
    changes = [word for word in words if not word.startswith("-")]
    if len(changes) < len(words) or (changes and "changes" not in arguments):
        unknown = next(word for word in words if word.startswith("-") or "changes" not in arguments)
        raise SboraxError(f"unknown argument {unknown}; see sborax {arguments.command} --help")
    if changes:
        arguments.changes += changes
    return arguments


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser("sborax", description="Fine-tune LLaMA-family language models in JAX, a few weights at a time.")
    parser.add_argument("--version", action="version", version=f"sborax {sborax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_training(commands)
    _add_generation(commands)
    _add_scoring(commands)
    _add_conversion(commands)
    _add_overviews(commands)
    _add_comparison(commands)
    _add_recipes(commands)
    _add_quickstart(commands)
    return parser


def _add_training(commands: Commands) -> None:
    train = _command(commands, "train", _train, "fine-tune a model, as described by an experiment")
    train.add_argument("experiment", help=EXPERIMENT)
    _add_changes(train)
    _add_mesh(train)
    train.add_argument("--out", metavar="RUN_DIR", help="directory of the run (default: runs/NAME OF THE EXPERIMENT)")
    train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in RUN_DIR")
    train.add_argument("--profile", action="store_true", help="write an xprof trace of a few steps to RUN_DIR/profile")
    train.add_argument(
        "--compile-cache",
        metavar="DIR",
        help="keep all compiled programs in DIR (default: those that took 0.05 s to compile, in the user's cache)",
    )
    launcher.add_arguments(train)

    sweep = _command(commands, "sweep", _importing(_sweep), "train one adapter for every combination of values")
    sweep.add_argument("experiment", help=EXPERIMENT)
    sweep.add_argument(
        "changes", metavar="key=value[,value]", nargs="*", default=[],
        help="values to train with, such as optimizer.lr=1e-4,3e-4 seed_adapter=0,1: every combination is a member; "
        "optimizer.lr=auto adds rates until the best is interior",
    )  # fmt: skip
    # Taken to be refused in one line, as `mesh=` is.
    _add_mesh(sweep, argparse.SUPPRESS)
    sweep.add_argument(
        "--out", metavar="DIR", help="directory of the runs (default: runs/NAME OF THE EXPERIMENT-sweep)"
    )
    sweep.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in DIR")
    sweep.add_argument(
        "--at-once", type=int, metavar="N", help="members computed together (default: 1 on a CPU, else all)"
    )
    sweep.add_argument(
        "--halving", metavar="STEP,...|auto",
        help="at each of these steps, stop the half of the members with the higher held-out loss",
    )  # fmt: skip


def _add_generation(commands: Commands) -> None:
    generate = _command(commands, "generate", _importing(_generate), "write text with a model or a run")
    _add_target(generate)
    generate.add_argument("--prompt", action="append", help="text to continue; repeat for several")
    generate.add_argument("--chat", action="store_true", help="answer every line of standard input, as a conversation")
    generate.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end each text before TEXT; repeat for several"
    )
    generate.add_argument("--template", help="wrap the prompt: chat, alpaca, or text with {instruction} in it")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens of total probability P"
    )
    _add_mesh(generate)
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")


def _add_scoring(commands: Commands) -> None:
    score = _command(commands, "eval", _importing(_eval), "score a model or a run on tasks")
    _add_target(score)
    score.add_argument("--tasks", default="", metavar="A,B", help="names of tasks, as `sborax tasks` lists them")
    score.add_argument("--harness", default="", metavar="A,B", help="names of tasks of lm-evaluation-harness")
    score.add_argument("--include", metavar="DIR", help="directory with your own tasks for the harness, as YAML")
    score.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="score N items of each task: drawn with the seed, in the harness the first ones",
    )
    score.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: 0)")
    score.add_argument(
        "--out", metavar="DIR", help="directory for scores.json and one JSONL file per task (default: runs/eval-TARGET)"
    )
    score.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help="a task's data: path or hub id")
    score.add_argument("--template", help="prompt around instructions: alpaca, chat, or text with {instruction} in it")
    score.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="tokens of a forward pass (default: 4096)"
    )
    score.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N,...", help=MESH)

    _command(commands, "tasks", _importing(_tasks), "list what `sborax eval --tasks` takes")


def _add_conversion(commands: Commands) -> None:
    says = "write a run, or several adapters with weights, as a dense model"
    merge = _command(commands, "merge", _importing(_merge), says)
    merge.add_argument("target", metavar="RUN_DIR", help="a run (with weight 1), or a base model with --add")
    merge.add_argument("out_dir", metavar="OUT_DIR")
    merge.add_argument(
        "--add", action="append", default=[], metavar="NAME=WEIGHT",
        help="also add WEIGHT times the change that a run or a PEFT adapter makes to the base; repeat for several",
    )  # fmt: skip
    merge.add_argument(
        "--combination", default="cat", metavar="KIND",
        help="how the changes are combined, by PEFT's names: cat (default) or svd, their weighted sum; ties_svd, "
        "dare_linear_svd, dare_ties_svd or magnitude_prune_svd; linear, ties, dare_linear, dare_ties or "
        "magnitude_prune, which combine the factors of LoRAs",
    )  # fmt: skip
    merge.add_argument("--density", type=float, metavar="D", help="share of entries that a combination keeps")
    merge.add_argument(
        "--majority-sign-method", choices=("total", "frequency"), default="total",
        help="the sign that TIES keeps: that of the sum (total, default), or that of most changes (frequency)",
    )  # fmt: skip
    merge.add_argument("--rank", type=int, metavar="R", help="rank of a combination in svd (default: not truncated)")
    merge.add_argument("--seed", type=int, default=0, help="seed of what DARE drops (default: 0)")
    merge.add_argument(
        "--approximate", choices=("inputs", "weights"),
        help="merge ResLoRA's input and middle shortcuts approximately, and print the error on the run's data",
    )  # fmt: skip

    says = "write a run of LoRAPrune as a smaller dense model, with its perplexity"
    slim = _command(commands, "slim", _importing(_slim), says)
    slim.add_argument("run_dir", metavar="RUN_DIR")
    slim.add_argument("out_dir", metavar="OUT_DIR")

    export = _command(commands, "export", _importing(_export), "write a run's adapter in PEFT's format")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out_dir", metavar="OUT_DIR")
    export.add_argument(
        "--as", dest="form", choices=("native", "lora"), default="native",
        help="native (default): as PEFT's own kind where PEFT has the method; lora: as plain LoRA, which is exact "
        "where the change has thin factors, and else truncated, with the error printed",
    )  # fmt: skip
    export.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in OUT_DIR; its other files stay"
    )
    export.add_argument(
        "--save-embedding-layers", action="store_true",
        help="store the embedding and the head of the base, too, for a run on a model whose vocabulary was resized",
    )  # fmt: skip
    export.add_argument(
        "--rank", type=int, metavar="R", help="rank of what --as lora truncates (default: the method's own)"
    )


def _add_overviews(commands: Commands) -> None:
    plan = _command(commands, "plan", _importing(_plan), "show what would be trained, without reading weights")
    plan.add_argument("target", metavar="EXPERIMENT|MODEL")
    _add_changes(plan)
    _add_mesh(plan, "axes of a mesh of devices, which need not exist: fsdp=8,tensor=2; auto picks one for --topology")
    plan.add_argument("--topology", metavar="NAME", help="compile for a TPU slice, which need not exist: v5e:16x16")
    plan.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: the longest of the data)")

    methods = _command(commands, "methods", _importing(_methods), "list the methods, or describe one")
    methods.add_argument("name", metavar="NAME", nargs="?")


def _add_comparison(commands: Commands) -> None:
    compare = _command(commands, "compare", _importing(_compare), "compare runs and sweeps in a report, with intervals")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="directories of runs or sweeps, the reference first")
    compare.add_argument(
        "--by", default="method", metavar="KEY,...", help="what differs: method, or keys of a config (default: method)"
    )
    compare.add_argument(
        "--base", metavar="DIR", help="scores of the base, written by `sborax eval`: shows what runs forgot"
    )
    compare.add_argument(
        "--published",
        metavar="RECIPE",
        help="name or file of a recipe whose published scores go beside those of the runs",
    )
    compare.add_argument(
        "--spectra", action="store_true", help="also load base and adapters, and show what training changed"
    )
    compare.add_argument(
        "--out", default="runs/compare", metavar="DIR", help="directory of the report (default: runs/compare)"
    )


def _add_recipes(commands: Commands) -> None:
    recipes = _command(commands, "recipes", _importing(_recipes), "list papers' tables as experiments, or print one")
    recipes.add_argument("name", metavar="NAME", nargs="?", help="name of a recipe, such as sbora/commonsense")


def _add_quickstart(commands: Commands) -> None:
    says = "fine-tune SmolLM2-135M with SBoRA in a few minutes"
    quickstart = _command(commands, "quickstart", _importing(_quickstart), says)
    _add_changes(quickstart)
    quickstart.add_argument("--out", metavar="RUN_DIR", help="directory of the run (default: runs/quickstart)")


def _command(commands: Commands, name: str, run: Command, says: str) -> argparse.ArgumentParser:
    """A new command with the options that all have."""
    parser = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="print a traceback with an error")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module, or the path of a .py file, with classes of your own; repeat for several",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "changes", metavar="key=value", nargs="*", default=[], help="change a field, such as optimizer.lr=1e-4"
    )


def _add_mesh(parser: argparse.ArgumentParser, says: str = MESH) -> None:
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=says)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", nargs="+",
        help="Hugging Face directory, hub id, .gguf file, or RUN_DIR; or several runs, or a sweep, of one base",
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter directory to load on top")


def _importing(run: Command) -> Command:
    """`run`, after importing the modules that `--import` names."""

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

    # A run that a signal stops has saved a checkpoint.
    return OK if train(arguments) else INTERRUPTED


def _sweep(arguments: argparse.Namespace) -> int:
    from sborax.cli.layout import with_mesh
    from sborax.cli.sweep import sweep

    changes = with_mesh(arguments.changes, arguments.mesh)
    finished = sweep(
        arguments.experiment,
        changes,
        arguments.out,
        arguments.resume,
        arguments.at_once,
        arguments.halving,
        imports=arguments.imports,
    )
    return OK if finished else INTERRUPTED


def _generate(arguments: argparse.Namespace) -> int:
    if not arguments.chat and not arguments.prompt:
        raise SboraxError("the following arguments are required: --prompt or --chat; see sborax generate --help")
    if arguments.chat and (arguments.prompt or arguments.template):
        raise SboraxError("--chat reads its turns from standard input; leave --prompt and --template out")
    if arguments.system is not None and not arguments.chat:
        raise SboraxError("--system begins a conversation; give --chat")
    if "" in arguments.stop:
        raise SboraxError("--stop '': every text holds the empty string; give what ends a text, or leave it out")
    from sborax.cli.chat import chat, generate, generate_several
    from sborax.cli.several import check_single, expand

    arguments.targets = expand(arguments.target)
    arguments.target = arguments.targets[0]
    if len(arguments.targets) > 1:
        check_single(arguments, "chat", "adapter", "mesh")
        generate_several(arguments)
    elif arguments.chat:
        chat(arguments)
    else:
        generate(arguments)
    return OK


def _eval(arguments: argparse.Namespace) -> int:
    from sborax.cli.evaluate import score, score_several
    from sborax.cli.several import check_single, expand

    arguments.targets = expand(arguments.target)
    arguments.target = arguments.targets[0]
    if len(arguments.targets) > 1:
        check_single(arguments, "adapter", "mesh", "harness", "include")
        score_several(arguments)
    else:
        score(arguments)
    return OK


def _tasks(arguments: argparse.Namespace) -> int:
    from sborax.cli.evaluate import tasks

    say(tasks())
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    from sborax.cli.compare import compare

    compare(arguments.runs, arguments.by, arguments.out, arguments.spectra, arguments.base, arguments.published)
    return OK


def _merge(arguments: argparse.Namespace) -> int:
    from sborax.adapters.combination import Combination
    from sborax.cli.merging import merge

    combination = Combination(arguments.combination, arguments.density, arguments.majority_sign_method, arguments.rank)
    merge(arguments.target, arguments.out_dir, arguments.approximate, arguments.add, combination, arguments.seed)
    return OK


def _slim(arguments: argparse.Namespace) -> int:
    from sborax.cli.commands import slim

    slim(arguments.run_dir, arguments.out_dir)
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from sborax.cli.commands import export

    layers = arguments.save_embedding_layers
    export(arguments.run_dir, arguments.out_dir, arguments.form, arguments.rank, arguments.overwrite, layers)
    return OK


def _plan(arguments: argparse.Namespace) -> int:
    from sborax.cli.plan import show

    say(show(arguments.target, arguments.changes, arguments.mesh, arguments.topology, arguments.length))
    return OK


def _methods(arguments: argparse.Namespace) -> int:
    from sborax.cli.methods import describe, overview

    say(overview() if arguments.name is None else describe(arguments.name))
    return OK


def _recipes(arguments: argparse.Namespace) -> int:
    from sborax.cli.recipes import describe, overview

    say(overview() if arguments.name is None else describe(arguments.name))
    return OK


def _quickstart(arguments: argparse.Namespace) -> int:
    from sborax.cli.quickstart import quickstart

    return OK if quickstart(arguments.changes, arguments.out) else INTERRUPTED
