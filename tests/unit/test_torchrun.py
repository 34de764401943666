"""Environment variables of torchrun for the processes of a script."""

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
def test_ranks_of_a_node_are_consecutive(nodes: str, ranks: list[int]) -> None:
    assert ranks_of([location(node) for node in nodes]) == ranks


def test_environments_have_the_variables_of_torchrun() -> None:
    [first, other, second] = environments([location("a"), location("b"), location("a")], LAUNCH)
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    assert [first[name] for name in names] == ["0", "0", "2", "0", "0"]
    assert [second[name] for name in names] == ["1", "1", "2", "0", "1"]
    assert [other[name] for name in names] == ["2", "0", "1", "1", "2"]
    for variables in (first, other, second):
        assert (variables["WORLD_SIZE"], variables["GROUP_WORLD_SIZE"]) == ("3", "2")
        assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("a.cluster", "29400")
        assert variables["TORCHELASTIC_RUN_ID"] == "run-1"
        assert (
            variables["TORCHELASTIC_RESTART_COUNT"],
            variables["TORCHELASTIC_MAX_RESTARTS"],
        ) == ("1", "3")


def test_all_gpus_of_a_node_are_visible_to_each_rank() -> None:
    locations = [location("a", "10"), location("b", "0"), location("a", "2"), location("c")]
    visible = [env.get("CUDA_VISIBLE_DEVICES") for env in environments(locations, LAUNCH)]
    assert visible == ["2,10", "0", "2,10", None]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_ranks_of_any_placement(nodes: list[str]) -> None:
    result = environments([location(node) for node in nodes], LAUNCH)
    assert sorted(int(env["RANK"]) for env in result) == [*range(len(nodes))]
    for node in set(nodes):
        of_node = [env for env, other in zip(result, nodes, strict=True) if other == node]
        local_ranks = sorted(int(env["LOCAL_RANK"]) for env in of_node)
        assert (
            local_ranks == [*range(int(of_node[0]["LOCAL_WORLD_SIZE"]))] == [*range(len(of_node))]
        )
        offsets = {int(env["RANK"]) - int(env["LOCAL_RANK"]) for env in of_node}
        assert len(offsets) == 1


def test_variables_match_those_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    plain, torchrun = [sys.executable, str(script)], ["-m", "torch.distributed.run", "--standalone"]
    before, torchrun_env = (
        json.loads(subprocess.run(command, capture_output=True, timeout=100, check=True).stdout)
        for command in (plain, [plain[0], *torchrun, plain[1]])
    )
    [own_env] = environments([location("a")], TorchrunLaunch("run", 1))
    # Internal variables of torchrun: files, signals and the Python executable.
    internal = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "PYTHON_EXEC"}
    internal |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}
    assert set(torchrun_env) - set(before) - internal <= set(own_env)
    same = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_NAME"}
    assert {name: torchrun_env[name] for name in same} == {name: own_env[name] for name in same}
