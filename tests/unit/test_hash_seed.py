"""All workers hash strings alike."""

import os

import pytest
import ray

from distplat.actors import hash_seed


def asked_for() -> str | None:
    options = hash_seed.options()
    seed: str | None = options["runtime_env"]["env_vars"]["PYTHONHASHSEED"] if options else None
    return seed


def test_a_worker_has_the_seed_of_its_ray_or_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert asked_for() == "0", "on a Ray of others"
    node = type("Node", (), {"head": True})()
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    assert asked_for() == "0", "on one that was started before"
    with hash_seed.inherited():
        assert os.environ["PYTHONHASHSEED"] == "0"
        assert asked_for() is None, "on one of its own"
        monkeypatch.setattr(ray, "nodes", lambda: [node, node])
        assert asked_for() == "0", "another node has joined"
    assert "PYTHONHASHSEED" not in os.environ


@pytest.mark.parametrize(("given", "seed"), [("5", "5"), ("random", "0"), ("", "0")])
def test_a_seed_of_the_users_is_kept(
    monkeypatch: pytest.MonkeyPatch, given: str, seed: str
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", given)
    assert asked_for() == seed
    with hash_seed.inherited():
        assert os.environ["PYTHONHASHSEED"] == seed
    assert os.environ["PYTHONHASHSEED"] == given
