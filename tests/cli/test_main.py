from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from weightspace import __version__
from weightspace.cli.main import main, program
from weightspace.errors import ZooError
from weightspace.io.writing import save_checkpoint

COMMANDS = [
    ["atlas"],
    ["demo"],
    ["embed"],
    ["explain"],
    ["inspect"],
    ["probe"],
    ["push"],
    ["search"],
    ["train", "autoencoder"],
    ["train", "joint"],
    ["train"],
    ["zoo"],
]
COMMANDS += [["zoo", name] for name in ("train", "import", "info", "export")]


def run(*words: str) -> subprocess.Popen[str]:
    code = "import sys; from weightspace.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    def install(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setitem(program.commands, "fail", click.Command("fail", callback=fail))

    return install


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert " ".join(words) in out
    assert "--help" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["inspekt"], "inspekt"),
        (["inspect"], "LOCATION"),
        (["inspect", "x", "--tokens"], "--tokens"),
        (["inspect", "x", "--token-size", "0"], "token-size"),
        (["zoo", "train", "--output", "z", "--runs", "many"], "many"),
        (["embed", "x"], "--encoder"),
        (["inspect", "does-not-exist"], "does-not-exist"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "inspect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZooError("zoo: no such\nzoo; check it"), 2, ["zoo: no such zoo; check it"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/zoo"), 2, ["/data/zoo", "no room", "free"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, ["no room"]),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), 2, ["/root/x", "Permission denied"]),
        (OSError("strange"), 1, ["OSError", "strange", "--debug"]),
        (KeyError("weights"), 1, ["KeyError", "weights", "--debug"]),
        (KeyboardInterrupt(), 130, ["interrupted", "kept"]),
        (ZooError("a\x1b[2Jb"), 2, ["a\\x1b[2Jb"]),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, words: list[str], failing, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert main(["fail"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert all(word in printed.err for word in words)


@pytest.mark.parametrize("words", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback(words: list[str], failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(ZooError("no zoo"))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no zoo\n")


def test_exit_codes_of_a_real_process(tmp_path: Path) -> None:
    save_checkpoint({"fc.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    good, bad = run("inspect", str(tmp_path), "--json"), run("inspect", str(tmp_path / "none"))
    assert (good.wait(), bad.wait()) == (0, 2)
    assert good.communicate()[1] == ""
    assert bad.communicate() == ("", f"error: {tmp_path / 'none'}: no such file or folder; check the path\n")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    save_checkpoint({"fc.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    process = run("inspect", str(tmp_path))
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output(tmp_path: Path) -> None:
    save_checkpoint({"fc.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    code = "import sys; from weightspace.cli.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "error: no room left on the disk; free some and run the same command again\n"


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line() -> None:
    # Shells start commands in the background with Ctrl-C ignored, and tests in them would inherit it.
    code = """
import signal, sys, time, types
from weightspace.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
stand_in = types.ModuleType("weightspace.inspection")
def inspect_location(*arguments, **options):
    print("ready", flush=True)
    time.sleep(1800)
stand_in.inspect_location = inspect_location
sys.modules["weightspace.inspection"] = stand_in
sys.exit(main(["inspect", "x"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "kept" in err


def test_names_that_are_not_text_can_be_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes text only")
    save_checkpoint({"fc.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    for words in (["inspect", str(tmp_path)], ["inspect", str(tmp_path), "--json"]):
        assert main(words) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert "\\udcff.safetensors" in out
