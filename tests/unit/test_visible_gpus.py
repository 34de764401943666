"""CUDA_VISIBLE_DEVICES of a train function, with fakes of `torch.cuda`."""

import os

import pytest
import torch

from distplat.actors import visible_gpus
from distplat.platform.topology import RankLocation

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCATIONS = [RankLocation("a", gpus=("3",)), RankLocation("b", gpus=("3",))]
LOCATIONS += [RankLocation("a", gpus=("5",))]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fake the process of rank 2 on Ray; return the record of `set_device`."""
    current: list[int] = []
    monkeypatch.setattr(visible_gpus, "_own_index", [])
    monkeypatch.setenv(VISIBLE, "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ[VISIBLE].split(",")))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    return current


def test_own_device_has_the_index_of_the_local_rank(process: list[int]) -> None:
    visible_gpus.show_gpus(LOCATIONS, 2)
    assert os.environ[VISIBLE] == "3,5"
    assert visible_gpus.own_device() == torch.device("cuda:1")
    assert process == [1]


def test_only_the_own_gpu_is_visible_without_node_peers_or_with_shared_gpus(
    process: list[int],
) -> None:
    visible_gpus.show_gpus(LOCATIONS[1:], 1)
    visible_gpus.show_gpus([*LOCATIONS, RankLocation("a", gpus=("5",))], 2)
    assert os.environ[VISIBLE] == "5"
    assert visible_gpus.own_device() == torch.device("cuda")
    assert process == []


def test_visible_gpus_do_not_change_in_later_attempts(
    process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    visible_gpus.show_gpus(LOCATIONS, 2)
    visible_gpus.show_gpus(LOCATIONS, 2)
    assert caplog.text == ""
    moved = [RankLocation("b", gpus=("0",)), RankLocation("a", gpus=("7",)), LOCATIONS[2]]
    visible_gpus.show_gpus([moved[1], moved[0], moved[2]], 2)
    assert caplog.text == ""  # another GPU has the first index
    visible_gpus.show_gpus([moved[0], moved[2], moved[1]], 1)
    assert "LOCAL_RANK 0 is not the number of this worker's GPU any more" in caplog.text
    assert os.environ[VISIBLE] == "3,5"
    assert visible_gpus.own_device() == torch.device("cuda:1")


def test_process_with_initialized_cuda_keeps_its_gpu(
    monkeypatch: pytest.MonkeyPatch, process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    visible_gpus.show_gpus(LOCATIONS, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_gpus.own_device() == torch.device("cuda")
    assert "this worker sees its own GPU alone" in caplog.text
    assert process == []
