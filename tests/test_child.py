"""A child process that answers messages: in time, too late, dead, and without its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from convplan._child import Child, ChildDied, ChildLate, end_with_parent, in_child

ECHO = """
import os, signal, subprocess, sys, time
from convplan._child import connection_to_parent, in_child
connection = connection_to_parent()
while True:
    try:
        word, _, rest = connection.recv_bytes().decode().partition(" ")
    except EOFError:
        break
    if word == "echo":
        connection.send_bytes(rest.encode())
    elif word == "silent":
        pass
    elif word == "exit":
        print("some last words", file=sys.stderr)
        sys.exit(int(rest))
    elif word == "signal":
        os.kill(os.getpid(), int(rest))
    elif word == "close":
        connection.close()
        time.sleep(60)
    elif word == "stubborn":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        connection.send_bytes(b"ready")
        time.sleep(60)
    elif word == "spawn":
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        connection.send_bytes(str(started.pid).encode())
    elif word == "about":
        connection.send_bytes(f"{in_child()} {os.environ.get('SOME_VARIABLE')} {sys.argv[1:]}".encode())
"""

Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the program above."""
    (tmp_path / "echo_program.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    started: list[Child] = []

    def begin(*arguments: str, **environ: str) -> Child:
        started.append(Child("echo_program", arguments, environ))
        return started[-1]

    yield begin
    for child in started:
        child.close()


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in time, or is a corpse that nobody has buried yet."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_it_answers(start: Start) -> None:
    child = start()
    for message in ("one", "two " * 100_000):
        child.send(f"echo {message}".encode())
        assert child.receive(30).decode() == message
    assert child.alive


def test_it_knows_that_it_is_a_child_and_has_arguments_and_variables(start: Start) -> None:
    child = start("--first", "second", SOME_VARIABLE="some value")
    child.send(b"about")
    assert child.receive(30).decode() == "True some value ['--first', 'second']"
    assert not in_child()


def test_no_answer_in_time_is_an_error_and_the_child_lives_on(start: Start) -> None:
    child = start()
    child.send(b"silent")
    with pytest.raises(ChildLate, match=r"no answer within 0\.05 s"):
        child.receive(0.05)
    child.send(b"echo still here")
    assert child.receive(30) == b"still here"


def test_an_exit_is_told_with_its_status_and_last_words(start: Start) -> None:
    child = start()
    child.send(b"exit 7")
    with pytest.raises(ChildDied, match="exit status 7; it said: some last words") as caught:
        child.receive(30)
    assert (caught.value.status, caught.value.how) == (7, "exit status 7")
    assert not child.alive


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_is_told_by_its_name(start: Start, number: signal.Signals) -> None:
    child = start()
    child.send(f"signal {int(number)}".encode())
    with pytest.raises(ChildDied, match=number.name) as caught:
        child.receive(30)
    assert caught.value.status == -number


def test_a_message_to_a_dead_child_is_an_error(start: Start) -> None:
    child = start()
    os.kill(child.pid, signal.SIGKILL)

    def send_until_it_fails() -> None:
        for _ in range(1_000):  # the first may still be taken
            child.send(b"echo " + b"x" * 10_000)

    with pytest.raises(ChildDied, match="SIGKILL"):
        send_until_it_fails()


def test_a_child_that_closes_its_end_and_lives_on_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convplan._child.CLOSING_S", 0.1)
    child = start()
    child.send(b"close")
    with pytest.raises(ChildDied, match="SIGKILL"):
        child.receive(30)
    assert gone(child.pid)


def test_killing_works_on_one_that_ignores_polite_signals(start: Start) -> None:
    child = start()
    child.send(b"stubborn")
    assert child.receive(30) == b"ready"
    os.kill(child.pid, signal.SIGTERM)
    assert child.alive
    child.kill()
    assert gone(child.pid)


def test_what_a_child_started_ends_with_it(start: Start) -> None:
    child = start()
    child.send(b"spawn")
    started = int(child.receive(30))
    assert psutil.pid_exists(started)
    child.kill()
    assert gone(started)


def test_a_closed_child_ends_by_itself(start: Start) -> None:
    with start() as child:
        child.send(b"echo once")
        child.receive(30)
    assert gone(child.pid)
    child.close()  # again is harmless


def test_what_was_said_is_told_once(start: Start) -> None:
    child = start()
    child.send(b"exit 1")
    with pytest.raises(ChildDied, match="some last words"):
        child.receive(30)
    assert child.said() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for it")
@pytest.mark.behaviour("C4")
def test_a_child_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "echo_program.py").write_text(ECHO)
    parent = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from convplan._child import Child
child = Child("echo_program")
child.send(b"stubborn")
child.receive(30)
print(child.pid, flush=True)
time.sleep(60)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environ) as started:
        assert started.stdout is not None
        pid = int(started.stdout.readline())
        assert psutil.pid_exists(pid)
        started.kill()
    assert gone(pid)


def test_a_process_whose_parent_is_another_than_it_thinks_ends() -> None:
    if sys.platform == "linux":
        code = "from convplan._child import end_with_parent; end_with_parent(1 << 30)"
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        assert subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode == 1
    else:
        end_with_parent(0)  # nothing to be had, and no error


def test_the_programs_are_of_no_use_on_a_command_line() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", "from convplan._child import connection_to_parent; connection_to_parent()"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "has no use on a command line" in done.stderr
