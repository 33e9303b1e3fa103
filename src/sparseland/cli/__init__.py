"""The command line: ``sparseland list | show | frontier | generate | reproduce | bench | study``.

Nothing heavy is imported here: ``--help`` must not wait for torch. Each command imports what it needs.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import sparseland
from sparseland.errors import SparselandError

DEBUG = "SPARSELAND_DEBUG"

app = typer.Typer(
    name="sparseland",
    help="Sparse transformers you can measure: published methods on any Hugging Face decoder.",
    epilog="Without MODEL the embedded SmolLM2-135M-Instruct is used; nothing is downloaded.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hugging Face id or folder (default: the embedded one)."),
]
Dtype = Annotated[
    str, typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.", show_default=True)
]
Device = Annotated[str | None, typer.Option(help="Torch device (default: CUDA if there is one).")]
# Numbers arrive as text and are parsed here: typer's own message would not repeat the value.
RopeScale = Annotated[
    str | None,
    typer.Option(
        metavar="FACTOR", help="Stretch the positions by this factor, for lengths beyond the context."
    ),
]


class Interrupted(Exception):
    """Ctrl-C, with what the user should know."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are one line on stderr.

    0 success, 1 an unexpected error (``SPARSELAND_DEBUG=1`` shows its traceback), 2 a mistake in what was
    asked for, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = typer.main.get_command(app)
        code = command.main(args=arguments, prog_name="sparseland", standalone_mode=False)
        sys.stdout.flush()
    except Interrupted as stop:
        return _fail(str(stop), 130, "")
    except KeyboardInterrupt:
        return _fail("interrupted", 130, "")
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        # typer's way out when it is the one that meets the closed pipe.
        return stop.code if isinstance(stop.code, int) else 1
    except SparselandError as error:
        return _fail(str(error), 2)
    except Exception as error:
        return _unexpected(error)
    if code == 130:
        return _fail("interrupted", 130, "")
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    # typer carries its own copy of click in new versions and imports click in old ones; both usage errors
    # have this method, and neither class can be named for both.
    if hasattr(error, "format_message"):
        return _fail(error.format_message(), 2)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", 130, "")
    if os.environ.get(DEBUG):
        raise error
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _fail(f"{lines[0]} (run with {DEBUG}=1 for the traceback)", 1)


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"sparseland: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"sparseland {sparseland.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command("list")
def list_methods(
    site: Annotated[
        str | None, typer.Option(help="Only methods that make this sparse, e.g. attention.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every method that works, one line each."""
    from sparseland.cli.catalog import show_list

    show_list(site, as_json)


@app.command("show")
def show_method(
    slug: Annotated[str, typer.Argument(help="A method's name, as in `sparseland list`.")],
    as_json: Json = False,
) -> None:
    """A method's card: paper, parameters, claims, our numbers."""
    from sparseland.cli.catalog import show_card

    show_card(slug, as_json)


@app.command("frontier")
def find_frontier(
    context: typer.Context,
    model: Model = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file or folder (default: Python's own documentation).")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Specs such as minference,flexprefill:gamma=0.9 (default: every method).")
    ] = "",
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens (default: 2048,4096; with --gpu 8192,32768).")
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="GPU scale: longer prompts on CUDA, positions stretched as they need it."),
    ] = False,
    tolerance: Annotated[
        str, typer.Option(metavar="SHARE", help="Allowed increase of the loss over dense; 0.01 is 1 %.")
    ] = "0.01",
    out: Annotated[Path, typer.Option(help="Folder for recipe.json, report.html, results.jsonl.")] = Path(
        "frontier"
    ),
    minutes: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="Leave out what is not measured after so many; 0 = no limit (default: 14 for the default "
            "model, methods and lengths, else no limit).",
        ),
    ] = None,
    rope_scale: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR",
            help="Stretch the positions by this factor, for lengths beyond the context; fit: as far as the "
            "longest prompt needs (default with --gpu).",
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Annotated[str, typer.Option(metavar="NUMBER", help="Seed of the tasks.")] = "0",
    as_json: Json = False,
) -> None:
    """Find the fastest sparse configuration within the allowed loss.

    Measures methods and budgets against dense on this machine, and writes a recipe, a report and all
    results. The same command again continues an interrupted run, and with more --minutes one whose time was
    over.
    """
    from sparseland.cli.frontier import gpu_defaults, parse_lengths, parse_stretch, run_frontier

    if gpu:
        lengths, device, rope_scale = gpu_defaults(lengths, device, rope_scale)
    options = {
        "model": model, "text": text, "tolerance": real("--tolerance", tolerance), "out": out,
        "lengths": parse_lengths("2048,4096" if lengths is None else lengths),
        "rope_scale": parse_stretch(rope_scale),
        "minutes": None if minutes is None else real("--minutes", minutes),
        "dtype": dtype, "device": device, "seed": whole("--seed", seed), "command": _command(context),
    }  # fmt: skip
    run_frontier(options, methods, as_json)


@app.command("generate")
def generate_text(
    model: Model = None,
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.json from `sparseland frontier` (default: dense).")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the prompt; - is standard input.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; after the file's text if both are given.")
    ] = None,
    max_new_tokens: Annotated[
        str, typer.Option(metavar="NUMBER", help="How many tokens to write at most.")
    ] = "256",
    rope_scale: RopeScale = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Answer a prompt with a recipe's sparsity.

    The text streams to stdout, the speed goes to stderr. Greedy; the model's chat template is used if it
    has one.
    """
    from sparseland.cli.generate import run_generate

    run_generate(
        model,
        recipe=recipe,
        prompt_file=prompt_file,
        prompt=prompt,
        max_new_tokens=whole("--max-new-tokens", max_new_tokens, least=1),
        dtype=dtype,
        device=device,
        rope_scale=None if rope_scale is None else real("--rope-scale", rope_scale),
    )


@app.command("reproduce")
def reproduce_claim(
    slug: Annotated[str, typer.Argument(help="A method's name, as in `sparseland list`.")],
    scale: Annotated[str, typer.Option(help="smoke (minutes on a laptop) or full (a GPU).")] = "smoke",
    as_json: Json = False,
) -> None:
    """Run a paper's headline claim as a program."""
    from sparseland.cli.measured import run_claim

    run_claim(slug, scale, as_json)


@app.command("bench")
def bench_op(
    context: typer.Context,
    op: Annotated[str, typer.Argument(help="An op, e.g. block_sparse_attention.")],
    length: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Prompt or cache (default: 8192 on a GPU, 4096 on a CPU)."),
    ] = None,
    density: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Part of the dense work to compute, e.g. 0.1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time an op against its best dense and sparse peers."""
    from sparseland.cli.measured import run_bench

    run_bench(
        op,
        as_json,
        length=None if length is None else whole("--length", length, least=1),
        density=None if density is None else real("--density", density),
        command=_command(context),
    )


@app.command("study")
def run_study_of(
    context: typer.Context,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="sparse-frontier.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Ids or folders, one per size (default: the embedded one)."
        ),
    ] = None,
    units: Annotated[str, typer.Option(help="Units of sparsity, e.g. block,quest (default: all six).")] = "",
    compression: Annotated[str, typer.Option(help="Compressions (default: 1,2,4,8,16).")] = "",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens (default: 1024).")] = "",
    tasks: Annotated[
        str, typer.Option(help="Tasks, e.g. needle,story-filtering (default: three easy ones).")
    ] = "",
    samples: Annotated[str, typer.Option(metavar="NUMBER", help="Samples per task and length.")] = "12",
    score: Annotated[
        str, typer.Option(help="What is compared: likelihood, chosen or generated.")
    ] = "likelihood",
    generate: Annotated[bool, typer.Option(help="Also decode answers greedily.")] = True,
    uncounted: Annotated[
        bool, typer.Option("--uncounted", help="Also measure tasks that the dense model can't do.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file or folder (default: Python's own documentation).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, summary.json, report.html.")] = Path(
        "study"
    ),
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Annotated[str, typer.Option(metavar="NUMBER", help="Seed of the tasks.")] = "0",
    as_json: Json = False,
) -> None:
    """Run a paper's study on your models.

    sparse-frontier: units of sparsity x compressions x lengths x tasks x model sizes, with the largest
    compression that keeps the accuracy, equal-cost comparison and the fitted law. The same command again
    continues an interrupted run.
    """
    from sparseland.cli.study import run_study

    options = {
        "models": models or [], "samples": whole("--samples", samples, least=1), "generate": generate,
        "uncounted": uncounted,
        "text": text, "out": out, "dtype": dtype, "device": device, "seed": whole("--seed", seed),
        "command": _command(context),
    }  # fmt: skip
    run_study(study, options, units, compression, lengths, tasks, score, as_json)


def real(option: str, text: str) -> float:
    """A finite number, or an error that names option and value."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SparselandError(f"{option} {text!r} is not allowed; it must be a number")
    return value


def whole(option: str, text: str, least: int = 0) -> int:
    """A whole number of at least ``least``, or an error that names option and value."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise SparselandError(f"{option} {text!r} is not allowed; it must be a whole number >= {least}")
    return int(text)


def _command(context: typer.Context) -> str:
    """The command as typed, for the report: rebuilt from the given options."""
    words = ["sparseland", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        spellings = parameter.secondary_opts if value is False else parameter.opts
        flag = next((o for o in spellings if o.startswith("--")), None)
        words += [] if flag is None else [flag]
        if not isinstance(value, bool):
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return shlex.join(words)
