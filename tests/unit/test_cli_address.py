"""Where a job goes: what the address says, who said it, and whether anybody is there."""

import socket
import time
from pathlib import Path

import pytest

from distplat.cli.address import Target, reach, target_of, token_at_hand
from distplat.platform.errors import ClusterUnreachable, SpecError


@pytest.mark.parametrize(
    ("option", "environ", "expected"),
    [
        (None, {}, Target("local", "local", "")),
        (None, {"RAY_ADDRESS": ""}, Target("local", "local", "")),
        ("local", {"RAY_ADDRESS": "auto"}, Target("local", "local", "--address")),
        ("auto", {}, Target("driver", "auto", "--address")),
        ("10.0.0.1:6379", {}, Target("driver", "10.0.0.1:6379", "--address")),
        ("[::1]:6379", {}, Target("driver", "[::1]:6379", "--address")),
        ("http://h:8265/", {}, Target("jobs", "http://h:8265", "--address")),
        ("https://h", {"RAY_ADDRESS": "auto"}, Target("jobs", "https://h", "--address")),
        (None, {"RAY_ADDRESS": "h:1"}, Target("driver", "h:1", "RAY_ADDRESS")),
        (
            None,
            {"RAY_ADDRESS": "h:1", "RAY_API_SERVER_ADDRESS": "http://h:2"},
            Target("jobs", "http://h:2", "RAY_API_SERVER_ADDRESS"),
        ),
    ],
)
def test_the_address_comes_from_the_strongest_source(
    option: str | None, environ: dict[str, str], expected: Target
) -> None:
    assert target_of(option, environ) == expected


@pytest.mark.parametrize(
    "text", ["h", "h:", "h:x", "h:99999", "http://", "http://h:x", "http://h:99999", "ftp://h:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is no address"):
        target_of(text, {})


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, None),
        ({}, "filed\n", "filed"),
        ({"RAY_AUTH_TOKEN": "given"}, "filed", "given"),
        ({"RAY_AUTH_TOKEN": "given", "RAY_AUTH_MODE": "disabled"}, "filed", None),
    ],
)
def test_the_token_is_taken_where_ray_looks(
    environ: dict[str, str], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if file is not None:
        path.write_text(file)
    assert token_at_hand({**environ, "RAY_AUTH_TOKEN_PATH": str(path)}) == expected


def test_a_closed_port_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=rf"127.0.0.1:{port} \(connection refused\)"):
        reach(f"http://127.0.0.1:{port}")
    assert time.monotonic() - began < 5
