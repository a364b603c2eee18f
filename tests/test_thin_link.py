"""The thin link: frames over sockets that hold against a bad peer, and two processes that end up with the same bits."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fxrpg import FxrpgError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench import thin_link  # noqa: E402
from bench.thin_link import Link  # noqa: E402


@pytest.fixture
def pair():
    """Both ends of a connection: ours as a Link, the other's bare."""
    ours, other = socket.socketpair()
    with ours, other:
        yield Link(ours, 0.3), other


def failure(call, *args, **kwargs) -> str:
    with pytest.raises(FxrpgError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_frames_pass_whole(pair):
    link, other = pair
    far = Link(other, 5.0)
    assert [link.send(data) for data in (b"", b"one", bytes(1000))] == [4, 7, 1004]
    assert [far.receive(1000) for _ in range(3)] == [b"", b"one", bytes(1000)]


def test_a_frame_in_pieces(pair):
    link, other = pair
    for byte in (3).to_bytes(4, "big") + b"abc":
        other.sendall(bytes([byte]))
    assert link.receive(3) == b"abc"


@pytest.mark.parametrize("size", [11, 2**32 - 1])
def test_a_long_frame_is_refused_before_it_is_read(pair, size):
    link, other = pair
    other.sendall(size.to_bytes(4, "big"))
    assert "at most 10 bytes" in failure(link.receive, 10)


@pytest.mark.parametrize("sent", [b"", b"\0\0", (9).to_bytes(4, "big") + b"half"])
def test_a_peer_that_leaves(pair, sent):
    link, other = pair
    other.sendall(sent)
    other.close()
    assert "found the end" in failure(link.receive, 100)


def test_a_silent_peer(pair):
    link, other = pair
    other.sendall(b"\0")
    assert "timed out" in failure(link.receive, 100)


def test_a_peer_that_drips(pair):
    """A byte now and then is no progress: the frame as a whole has its time."""
    link, other = pair
    other.sendall((1000).to_bytes(4, "big"))
    done = threading.Event()

    def drip():
        while not done.wait(0.02):
            other.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert "timed out" in failure(link.receive, 1000)
    finally:
        done.set()
        dripping.join()


def test_a_peer_that_does_not_read(pair):
    link, _other = pair
    assert "must take a frame" in failure(link.send, bytes(1 << 26))


def test_other_machines_only_when_asked():
    for host in ("127.0.0.1", "127.1.2.3", "::1"):
        assert thin_link.checked_host(host, False) == host
    for host in ("0.0.0.0", "192.168.0.1", "::"):
        assert "--open" in failure(thin_link.checked_host, host, False)
        assert thin_link.checked_host(host, True) == host
    assert "must be an IP address" in failure(thin_link.checked_host, "localhost", True)


def test_a_sender_that_talks_nonsense():
    """The receiver ends with one error, whatever is sent."""
    junk = b"not a delta"
    for first, second in ((b"unknown", b""), (b"dense", junk), (b"\xff\xfe", b""), (b"x" * 65, b"")):
        with socket.create_server((thin_link.LOOPBACK, 0)) as listener:
            client = socket.create_connection(listener.getsockname(), 5.0)
            with client:
                far = Link(client, 5.0)
                far.send(first)
                far.send(second)
                assert failure(thin_link.serve, listener, 5.0)


def test_nobody_connects():
    with socket.create_server((thin_link.LOOPBACK, 0)) as listener:
        assert "must connect" in failure(thin_link.serve, listener, 0.1)


def test_two_processes_with_the_same_bits(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "thin_link.py"), "--steps", "1", "--timeout", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()[2:]}
    assert rows.keys() == thin_link.PLANS.keys()
    first, update = {}, {}
    for name, line in rows.items():
        assert line.rstrip().endswith("yes")
        numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", line.removeprefix(name))]
        *_, first[name], seconds, update[name], update_seconds = numbers
        assert (seconds, update_seconds) == (round(first[name] * 8 / 100), round(update[name] * 8 / 100))
    pranc = 4 * (1_000 + 1_376) + 8 * 19  # coefficients, moments of norms, their counters
    assert max(first["PRANC, 1,000"], update["PRANC, 1,000"]) < pranc + 500
    assert first["dense"] > 50 * first["ring, 1,000"]
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(capsys):
    with socket.create_server((thin_link.LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    assert thin_link.main(["send", "--port", str(port), "--timeout", "5"]) == 2
    assert thin_link.main(["receive", "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["thin_link"] * 2
