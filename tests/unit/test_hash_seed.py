"""PYTHONHASHSEED is equal on all workers."""

import os

import pytest
import ray

from distplat.actors import hash_seed


def requested_seed() -> str | None:
    options = hash_seed.options()
    seed: str | None = options["runtime_env"]["env_vars"]["PYTHONHASHSEED"] if options else None
    return seed


def test_seed_is_inherited_or_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert requested_seed() == "0", "a foreign cluster"
    node = type("Node", (), {"head": True})()
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    assert requested_seed() == "0", "a Ray started before"
    with hash_seed.inherited():
        assert os.environ["PYTHONHASHSEED"] == "0"
        assert requested_seed() is None, "a Ray started by this process"
        monkeypatch.setattr(ray, "nodes", lambda: [node, node])
        assert requested_seed() == "0", "another node has joined"
    assert "PYTHONHASHSEED" not in os.environ


@pytest.mark.parametrize(("user_seed", "seed"), [("5", "5"), ("random", "0"), ("", "0")])
def test_user_seed_is_kept(monkeypatch: pytest.MonkeyPatch, user_seed: str, seed: str) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", user_seed)
    assert requested_seed() == seed
    with hash_seed.inherited():
        assert os.environ["PYTHONHASHSEED"] == seed
    assert os.environ["PYTHONHASHSEED"] == user_seed
