"""The command line: it translates options into calls, and errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import pkgutil
import sys
import warnings
from typing import Any, NoReturn

import click

from evalkit import __version__
from evalkit.cli.messages import is_json, say, show_messages
from evalkit.errors import EvalkitError, InputError, brief, did_you_mean, shortened
from evalkit.system.processes import is_main_process, world_size

__all__ = ["main", "root"]

BAD_INPUT = 2
INTERRUPTED = 130

# Verb: "module:command", loaded on first use.
VERBS: dict[str, str] = {
    "checkpoint": "generation.cli.checkpoint:checkpoint",
    "compare": "evalkit.cli.compare:compare",
    "completion": "evalkit.cli.completion:completion",
    "curves": "evalkit.cli.compare:curves",
    "doctor": "evalkit.cli.tools:doctor",
    "demo": "generation.cli.demo:demo",
    "features": "evalkit.cli.compare:features",
    "plan": "evalkit.cli.plan:plan",
    "precision-check": "generation.cli.precision_check:precision_check",
    "published": "reference_batches.cli:published",
    "reference": "reference_batches.cli:reference",
    "report": "evalkit.cli.report:report",
    "sample": "generation.cli.sample:sample",
    "stats": "evalkit.cli.compare:stats",
    "sweep": "generation.cli.sweep:sweep",
    "table": "evalkit.cli.table:table",
    "train": "generation.cli.train:train",
    "upsample": "generation.cli.sample:upsample",
    "verify": "evalkit.cli.tools:verify",
    "weights": "evalkit.cli.tools:weights",
}


class _Root(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in VERBS:
            return None
        found: click.Command = pkgutil.resolve_name(VERBS[name])
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            # click itself suggests commands that are loaded already, and these are not.
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if is_json():
                raise click.Abort from None  # click itself would print an empty line
            raise


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version=__version__)
@click.pass_context
def root(context: click.Context) -> None:
    """FID, sFID, Inception Score, precision and recall of generated images, exactly as ADM reports them."""
    show_messages()
    if context.invoked_subcommand != "train" and (size := world_size()) > 1:
        raise InputError(
            f"WORLD_SIZE={size}: torchrun or the like started this command {size} times, and each would do "
            "all of the work. Start it once: with --engine ray it uses all GPUs of this machine, with "
            "--engine ray=ADDRESS those of a cluster. Only `evalkit train` works under torchrun. Where a "
            "training script starts this command, unset RANK and WORLD_SIZE for it."
        )


# Of GNU's OpenMP, in torch's wheels for Linux, and of OpenBLAS, in NumPy's and SciPy's.
_SLEEP_SOON = {"GOMP_SPINCOUNT": "1000", "OPENBLAS_THREAD_TIMEOUT": "10"}


def _share_cores() -> None:
    """Let threads that wait for one another sleep soon; to be called before torch and NumPy are loaded.

    By default they spin for milliseconds. Where another program holds a core, they take the others from the
    thread that they wait for: on 2 cores, the network then ran at a ninth of its speed at worst, and FID took
    34 s instead of 3. Where all cores are free, sleeping soon costs nothing that could be measured.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SLEEP_SOON.items():
            os.environ.setdefault(name, value)


def _print_anything() -> None:
    """Write characters that the terminal does not have, and names that are not UTF-8, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> NoReturn:
    """Run the command line; exit 0 on success, 2 on bad usage or input, 130 when interrupted."""
    _share_cores()
    _print_anything()
    # Pillow tells of every tag that it does not like; what cannot be decoded is an error all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not _is_of_printing(error):
            raise
        _complain(f"Error: Cannot write to standard output: {error.strerror}. Output files are complete.")
        code = BAD_INPUT
        # Nothing more shall be tried at the end of the process.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int:
    if "_EVALKIT_COMPLETE" in os.environ:  # the Tab key was pressed: what follows is for click
        importlib.import_module("evalkit.cli.completion")
    try:
        result = root.main(standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        _complain(shortened(text.getvalue().rstrip()))
        return BAD_INPUT
    except EvalkitError as error:
        who = "" if is_main_process() else f" (rank {os.environ['RANK']})"
        _complain(f"Error{who}: {error}")
        return BAD_INPUT
    except OSError as error:
        # Names that are too long, and folders that may not be looked into, wherever they are met first.
        if error.filename is None or error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
            raise
        _complain(f"Error: {brief(os.fsdecode(error.filename), 200)}: {error.strerror}.")
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        if is_main_process():
            _complain("Interrupted. Stored results are kept; run the same command again to resume.")
        return INTERRUPTED
    except SystemExit as exit_:
        # click ends so, with 1, when the reader of a pipe has gone: `evalkit ... | head`.
        return 0 if exit_.code == 1 else int(exit_.code or 0)
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    say(text.removeprefix("Error: ") if is_json() else text, "error")


def _is_of_printing(error: OSError) -> bool:
    """Whether it comes from :func:`click.echo`, with which all is printed, or from the flush at the end."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code in (click.echo.__code__, main.__code__)
