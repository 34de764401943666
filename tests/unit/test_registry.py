"""The registry: who may take a name, what is said about an unknown one, when it looks around."""

import threading

import pytest

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.catalog import Registry


def make(name: str, module: str = "here") -> type:
    return type(name, (), {"__module__": module, "__qualname__": name})


def test_a_thing_is_found_under_its_name() -> None:
    registry: Registry[type] = Registry("strategy")
    ring = make("Ring")
    assert registry.register("ring")(ring) is ring
    assert registry.get("ring") is ring
    registry.register("alpha")(make("Alpha"))
    assert registry.names() == ["alpha", "ring"]


def test_the_same_thing_twice_is_fine() -> None:
    registry: Registry[type] = Registry("strategy")
    again = make("Ring")
    registry.register("ring")(make("Ring"))
    registry.register("ring")(again)  # as after a reload
    assert registry.get("ring") is again


@pytest.mark.parametrize("other", [make("Ring", "there"), make("Circle")])
def test_another_thing_of_the_same_name_is_refused(other: type) -> None:
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


def test_a_registered_instance_is_named_by_its_class() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(SpecError, match=r"already builtins\.1; give builtins\.2"):
        registry.register("one")(2)


def test_an_unknown_name_gets_a_suggestion() -> None:
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


def test_discovery_comes_late_and_once() -> None:
    calls = []

    def discover() -> None:
        calls.append(1)
        assert registry.names() == []  # a look-up inside discovery does not start it again
        registry.register("ring")(make("Ring"))

    registry: Registry[type] = Registry("strategy", discover)
    assert calls == []
    assert registry.names() == ["ring"]
    registry.get("ring")
    assert calls == [1]


def test_a_failed_discovery_is_not_taken_for_an_empty_one() -> None:
    def discover() -> None:
        raise ImportError("broken")

    registry: Registry[type] = Registry("strategy", discover)
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            registry.names()


def test_whoever_looks_up_meanwhile_waits_for_the_discovery() -> None:
    """Two requests for another number of workers, in two threads of a controller."""
    begun, go_on = threading.Event(), threading.Event()

    def discover() -> None:
        begun.set()
        go_on.wait(60)
        registry.register("ring")(make("Ring"))

    registry: Registry[type] = Registry("strategy", discover)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(registry.names())) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.wait(60)
    threads[1].join(0.05)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [["ring"], ["ring"]]
