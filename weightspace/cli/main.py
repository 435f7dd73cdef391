"""Entry point of the command line: the commands, and exit codes."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from weightspace import __version__
from weightspace.cli.embeddings import atlas, embed, explain, probe, search
from weightspace.cli.inspect import inspect
from weightspace.cli.options import USER_ERROR
from weightspace.cli.push import push
from weightspace.cli.sample import evaluate_samples, sample
from weightspace.cli.train import demo, train
from weightspace.cli.zoo import crawl, zoo
from weightspace.errors import WeightspaceError
from weightspace.printing import emit, emit_warnings

_INTERRUPTED = 128 + 2  # what shells report for a program that SIGINT ended
_BROKEN_PIPE = 128 + 13
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 2**30
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="weightspace")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:
    """Trained models as data: open checkpoints, tokenize their weights, and learn from them.

    Results go to standard output, progress and errors to standard error. Exit code 2 is an error that you can mend.
    """


_COMMANDS = (demo, inspect, crawl, zoo, train, embed, probe, search, explain, atlas, sample, evaluate_samples, push)
for _command in _COMMANDS:
    program.add_command(_command)


def tune_process() -> None:
    """Sets what must be set before torch is imported; a value from the environment wins."""
    # OpenMP threads that spin long for each other stall many times over when other programs share the cores, and those
    # that do not spin at all lose a third on idle cores: this is about 20 microseconds.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Training frees and asks for the same few megabytes at every step: keeping them saves the page faults.
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; other libraries have none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        arguments: what stands after the program's name; ``sys.argv`` by default. ``--debug`` may stand anywhere.
    """
    tune_process()
    emit_warnings()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    words = [word for word in words if word != "--debug"]
    try:
        with program.make_context("weightspace", words) as context:
            program.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        emit(error.format_message().splitlines(), err=True)
        return USER_ERROR
    except click.ClickException as error:
        return _fail(error.format_message(), USER_ERROR, debug=False)
    except BrokenPipeError:
        _give_up_output()
        return _BROKEN_PIPE  # whoever read the output has enough
    except WeightspaceError as error:
        return _fail(str(error), USER_ERROR, debug)
    except OSError as error:
        _give_up_output()
        message, code = _os_error(error)
        return _fail(message, code, debug)
    except KeyboardInterrupt:
        message = "interrupted; the work finished so far is kept, run the same command again to go on"
        return _fail(message, _INTERRUPTED, debug)
    except Exception as error:
        return _fail(_unexpected(error), 1, debug)
    return 0


def _os_error(error: OSError) -> tuple[str, int]:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _NO_ROOM:
        return f"{where}no room left on the disk; free some and run the same command again", USER_ERROR
    if error.filename and error.strerror:
        return f"{where}{error.strerror}; check the path and its permissions", USER_ERROR
    return _unexpected(error), 1


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (unexpected; rerun with --debug to see where)"


def _give_up_output() -> None:
    """Drops output that cannot be written; otherwise Python tries again at exit, and complains again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # A progress bar leaves its line open.
    start = "\n" if sys.stderr.isatty() else ""
    click.echo(start, nl=False, err=True)
    emit([f"error: {' '.join(message.split())}"], err=True)
    return code
