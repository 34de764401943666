"""What a train function sees of its node's cards: by the variable alone, there is no card here."""

import os

import pytest
import torch

from distplat.actors import cards
from distplat.platform.topology import RankLocation

VISIBLE = "CUDA_VISIBLE_DEVICES"
HERE = [RankLocation("a", cards=("3",)), RankLocation("b", cards=("3",))]
HERE += [RankLocation("a", cards=("5",))]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process of rank 2, as Ray has started it; gives the devices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(cards, "_own", [])
    monkeypatch.setenv(VISIBLE, "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ[VISIBLE].split(",")))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    return current


def test_the_own_card_is_that_of_the_local_rank(process: list[int]) -> None:
    cards.show_cards(HERE, 2)
    assert os.environ[VISIBLE] == "3,5"
    assert cards.own_device() == torch.device("cuda:1")
    assert process == [1]


def test_who_shares_no_node_or_shares_a_card_sees_his_alone(process: list[int]) -> None:
    cards.show_cards(HERE[1:], 1)
    cards.show_cards([*HERE, RankLocation("a", cards=("5",))], 2)
    assert os.environ[VISIBLE] == "5"
    assert cards.own_device() == torch.device("cuda")
    assert process == []


def test_what_is_seen_stays_through_later_attempts(
    process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    cards.show_cards(HERE, 2)
    cards.show_cards(HERE, 2)
    assert caplog.text == ""
    moved = [RankLocation("b", cards=("0",)), RankLocation("a", cards=("7",)), HERE[2]]
    cards.show_cards([moved[1], moved[0], moved[2]], 2)
    assert caplog.text == ""  # another card in the place of the first
    cards.show_cards([moved[0], moved[2], moved[1]], 1)
    assert "LOCAL_RANK 0 is not the number of this worker's card any more" in caplog.text
    assert os.environ[VISIBLE] == "3,5"
    assert cards.own_device() == torch.device("cuda:1")


def test_a_process_that_has_used_cuda_keeps_its_card(
    monkeypatch: pytest.MonkeyPatch, process: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    cards.show_cards(HERE, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cards.own_device() == torch.device("cuda")
    assert "this worker sees its own card alone" in caplog.text
    assert process == []
