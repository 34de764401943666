"""Processes of a script get torchrun's variables, rank by rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.torchrun import ProcessLocation, TorchrunLaunch, environments, ranks_of

LAUNCH = TorchrunLaunch("run-1", 29400, restarts=1, max_restarts=3)


def location(node: str, *gpus: str) -> ProcessLocation:
    return ProcessLocation(node, f"{node}.cluster", gpus)


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [("a", [0]), ("aab", [0, 1, 2]), ("aba", [0, 2, 1]), ("abcab", [0, 2, 4, 1, 3])],
)
def test_ranks_of_a_node_are_neighbours(nodes: str, ranks: list[int]) -> None:
    assert ranks_of([location(node) for node in nodes]) == ranks


def test_variables() -> None:
    [first, other, second] = environments([location("a"), location("b"), location("a")], LAUNCH)
    own = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    assert [first[name] for name in own] == ["0", "0", "2", "0", "0"]
    assert [second[name] for name in own] == ["1", "1", "2", "0", "1"]
    assert [other[name] for name in own] == ["2", "0", "1", "1", "2"]
    for one in (first, other, second):
        assert (one["WORLD_SIZE"], one["GROUP_WORLD_SIZE"]) == ("3", "2")
        assert (one["MASTER_ADDR"], one["MASTER_PORT"]) == ("a.cluster", "29400")
        assert one["TORCHELASTIC_RUN_ID"] == "run-1"
        assert (one["TORCHELASTIC_RESTART_COUNT"], one["TORCHELASTIC_MAX_RESTARTS"]) == ("1", "3")


def test_all_cards_of_a_node_are_visible_so_that_the_local_rank_is_an_index() -> None:
    locations = [location("a", "10"), location("b", "0"), location("a", "2"), location("c")]
    found = environments(locations, LAUNCH)
    seen = [one.get("CUDA_VISIBLE_DEVICES") for one in found]
    assert seen == ["2,10", "0", "2,10", None]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_any_placement(nodes: list[str]) -> None:
    found = environments([location(node) for node in nodes], LAUNCH)
    assert sorted(int(one["RANK"]) for one in found) == [*range(len(nodes))]
    for node in set(nodes):
        here = [one for one, at in zip(found, nodes, strict=True) if at == node]
        locally = sorted(int(one["LOCAL_RANK"]) for one in here)
        assert locally == [*range(int(here[0]["LOCAL_WORLD_SIZE"]))] == [*range(len(here))]
        offsets = {int(one["RANK"]) - int(one["LOCAL_RANK"]) for one in here}
        assert len(offsets) == 1


def test_no_variable_of_torchrun_is_missing(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    plain, torchrun = [sys.executable, str(script)], ["-m", "torch.distributed.run", "--standalone"]
    before, theirs = (
        json.loads(subprocess.run(command, capture_output=True, timeout=100, check=True).stdout)
        for command in (plain, [plain[0], *torchrun, plain[1]])
    )
    [ours] = environments([location("a")], TorchrunLaunch("run", 1))
    # What is torchrun's own business: its files, its signals, and which Python it is.
    own = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "PYTHON_EXEC"}
    own |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}
    assert set(theirs) - set(before) - own <= set(ours)
    same = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_NAME"}
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
