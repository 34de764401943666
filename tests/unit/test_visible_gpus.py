"""What a train function sees of its node's GPUs: by the variable alone, there is no GPU here."""

import os

import pytest
import torch

from distplat.actors import visible_gpus
from distplat.platform.topology import RankLocation

VISIBLE = "CUDA_VISIBLE_DEVICES"
HERE = [RankLocation("a", gpus=("3",)), RankLocation("b", gpus=("3",))]
HERE += [RankLocation("a", gpus=("5",))]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process of rank 2, as Ray has started it; gives the devices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(visible_gpus, "_own_index", [])
    monkeypatch.setenv(VISIBLE, "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ[VISIBLE].split(",")))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    return current


def test_the_own_card_is_that_of_the_local_rank(process: list[int]) -> None:
    visible_gpus.show_gpus(HERE, 2)
    assert os.environ[VISIBLE] == "3,5"
    assert visible_gpus.own_device() == torch.device("cuda:1")
    assert process == [1]


def test_who_shares_no_node_or_shares_a_card_sees_his_alone(process: list[int]) -> None:
    visible_gpus.show_gpus(HERE[1:], 1)
    visible_gpus.show_gpus([*HERE, RankLocation("a", gpus=("5",))], 2)
    assert os.environ[VISIBLE] == "5"
    assert visible_gpus.own_device() == torch.device("cuda")
    assert process == []


def test_what_is_seen_stays_through_later_attempts(
    process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    visible_gpus.show_gpus(HERE, 2)
    visible_gpus.show_gpus(HERE, 2)
    assert caplog.text == ""
    moved = [RankLocation("b", gpus=("0",)), RankLocation("a", gpus=("7",)), HERE[2]]
    visible_gpus.show_gpus([moved[1], moved[0], moved[2]], 2)
    assert caplog.text == ""  # another GPU in the place of the first
    visible_gpus.show_gpus([moved[0], moved[2], moved[1]], 1)
    assert "LOCAL_RANK 0 is not the number of this worker's GPU any more" in caplog.text
    assert os.environ[VISIBLE] == "3,5"
    assert visible_gpus.own_device() == torch.device("cuda:1")


def test_a_process_that_has_used_cuda_keeps_its_card(
    monkeypatch: pytest.MonkeyPatch, process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    visible_gpus.show_gpus(HERE, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_gpus.own_device() == torch.device("cuda")
    assert "this worker sees its own GPU alone" in caplog.text
    assert process == []
