"""The registry of strategies: registration, unknown names, discovery."""

import threading

import pytest

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.catalog import Registry


def make(name: str, module: str = "here") -> type:
    return type(name, (), {"__module__": module, "__qualname__": name})


def test_registered_class_is_found_by_name() -> None:
    registry: Registry[type] = Registry("strategy")
    ring = make("Ring")
    assert registry.register("ring")(ring) is ring
    assert registry.get("ring") is ring
    registry.register("alpha")(make("Alpha"))
    assert registry.names() == ["alpha", "ring"]


def test_same_class_may_be_registered_twice() -> None:
    registry: Registry[type] = Registry("strategy")
    reloaded = make("Ring")
    registry.register("ring")(make("Ring"))
    registry.register("ring")(reloaded)
    assert registry.get("ring") is reloaded


@pytest.mark.parametrize("other", [make("Ring", "there"), make("Circle")])
def test_another_class_of_the_same_name_is_rejected(other: type) -> None:
    registry: Registry[type] = Registry("strategy")
    first = make("Ring")
    registry.register("ring")(first)
    with pytest.raises(SpecError) as caught:
        registry.register("ring")(other)
    assert str(caught.value) == (
        f"strategy 'ring' is already here.Ring; "
        f"give {other.__module__}.{other.__qualname__} another name"
    )
    assert registry.get("ring") is first


def test_registered_instance_is_named_by_its_class() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(SpecError, match=r"already builtins\.1; give builtins\.2"):
        registry.register("one")(2)


def test_unknown_name_gets_a_suggestion() -> None:
    registry: Registry[type] = Registry("strategy")
    registry.register("ring")(make("Ring"))
    registry.register("ps-sync")(make("PsSync"))
    with pytest.raises(SpecError) as caught:
        registry.get("rnig")
    assert caught.value.problems == (
        Problem(
            ("strategy",),
            "unknown strategy 'rnig'",
            "did you mean 'ring'? allowed: ps-sync, ring",
        ),
    )


def test_discovery_is_lazy_and_runs_once() -> None:
    calls = []

    def discover() -> None:
        calls.append(1)
        assert registry.names() == []  # a look-up inside discovery does not start another one
        registry.register("ring")(make("Ring"))

    registry: Registry[type] = Registry("strategy", discover)
    assert calls == []
    assert registry.names() == ["ring"]
    registry.get("ring")
    assert calls == [1]


def test_failed_discovery_is_raised_each_time() -> None:
    def discover() -> None:
        raise ImportError("broken")

    registry: Registry[type] = Registry("strategy", discover)
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            registry.names()


def test_concurrent_look_up_waits_for_the_discovery() -> None:
    """Two threads of a controller may handle resize requests at once."""
    started, proceed = threading.Event(), threading.Event()

    def discover() -> None:
        started.set()
        proceed.wait(60)
        registry.register("ring")(make("Ring"))

    registry: Registry[type] = Registry("strategy", discover)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(registry.names())) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert started.wait(60)
    threads[1].join(0.05)
    proceed.set()
    for thread in threads:
        thread.join(60)
    assert found == [["ring"], ["ring"]]
