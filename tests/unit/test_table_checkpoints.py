"""Embedding tables in checkpoints: a run that goes on from one has the bits of one that did not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import nn
from words import WIDTH, Net, Words

from distplat import Trainer
from distplat.nn import ShardedEmbedding, ShardedEmbeddingBag
from distplat.platform.checkpoints import Catalogue
from distplat.platform.errors import ProtocolError, SpecError
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import TablePlan, TableSpec, plan_of
from distplat.platform.tensor_slices import Bundle, assemble_tensors
from distplat.strategies.checkpoint.checkpoint_types import ArrayRefs, CheckpointPart
from distplat.strategies.server.table_store import TableServer
from distplat.strategies.sparse.table import RowGradients

SPEC = TableSpec("t", 50, 3, 1.0)
OPTIMIZERS = ["SGD", "Adagrad", "SparseAdam", "RowWiseAdagrad"]


def job(world: int, optimizer: str = "Adagrad", *, every: int = 4, **more: Any) -> Any:
    embeddings = {"servers": 2, "optimizer": {"name": optimizer, "lr": 0.1}}
    fields: dict[str, Any] = {
        "optimizer": {"name": "Adam", "lr": 0.1},
        "lr_schedule": {"name": "cosine"},
        "embeddings": {**embeddings, **more.pop("embeddings", {})},
        "global_batch_size": 9,
        "steps": 12,
        "checkpoint": {"every_steps": every},
        **more,
    }
    return job_of(workers=world, **fields)


def bits(run: LocalRun) -> dict[str, Any]:
    """Give model and tables, rows in the order of ids."""
    found: dict[str, Any] = {k: v.numpy().tobytes() for k, v in run.parameters().items()}
    for number in range(2):
        tables = [service.store.tables[number].copy() for service in run.tables.table_servers]
        ids = np.concatenate([table.pop("ids") for table in tables])
        for name in tables[0]:
            values = np.concatenate([table[name] for table in tables])
            found[f"{number}/{name}"] = values[np.argsort(ids)].tobytes()
        found[f"{number}/ids"] = np.sort(ids).tolist()
        found[f"{number}/step"] = {s.store.tables[number].updates for s in run.tables.table_servers}
    return found


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_run_goes_on_with_the_same_bits(strategy: str, optimizer: str) -> None:
    spec = job(2, optimizer, strategy=strategy)
    whole = train(spec, Words)
    assert sorted(whole.checkpoints) == [4, 8, 12]
    for step in (4, 8):
        assert bits(train(spec, Words, saved=whole.checkpoints[step])) == bits(whole)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "embeddings", [{"servers": 1}, {"servers": 3}, {"partition": "range"}], ids=str
)
def test_other_servers_take_the_rows_over(embeddings: dict[str, Any]) -> None:
    whole = train(job(2), Words)
    other = train(job(2, embeddings=embeddings), Words, saved=whole.checkpoints[4])
    mine, expected = bits(other), bits(whole)
    # Not the bits: in which order torch's bag adds up a row's gradients hangs on the rows' order.
    for name in ("0/rows", "0/sum", "1/rows", "1/sum", "head.weight"):
        first, second = (np.frombuffer(found[name], np.float32) for found in (mine, expected))
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    assert mine["0/ids"] == expected["0/ids"]


@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_asynchronous_tables_with_one_rank(strategy: str) -> None:
    spec = job(1, strategy=strategy, embeddings={"asynchronous": True})
    whole = train(spec, Words)
    resumed = train(spec, Words, saved=whole.checkpoints[8])
    assert bits(resumed) == bits(whole)


def test_asynchronous_tables_with_some_ranks() -> None:
    spec = job(3, strategy="ps-async", embeddings={"asynchronous": True})
    whole = train(spec, Words)
    resumed = train(spec, Words, saved=whole.checkpoints[12 if 12 in whole.checkpoints else 8])
    assert bits(resumed).keys() == bits(whole).keys()


class Wider(Words):
    def model(self) -> nn.Module:
        return Net(ShardedEmbedding(41, WIDTH), ShardedEmbeddingBag(40, WIDTH, padding_idx=0))


def test_a_checkpoint_of_other_tables_is_refused() -> None:
    whole = train(job(1), Words)
    with pytest.raises(SpecError, match="'words' has rows 41, had 40"):
        train(job(1), Wider, saved=whole.checkpoints[4])


def in_process(tmp_path: Path, resume: Path | None = None, **more: Any) -> Any:
    return Trainer(job(0, storage_path=str(tmp_path), **more), Words, resume=resume)


def test_through_files(tmp_path: Path) -> None:
    whole = in_process(tmp_path).fit()
    folder = whole.path / "checkpoints" / "step-000008"
    names = {path.name for path in folder.iterdir()}
    assert {"embeddings-0.safetensors", "embeddings-1.safetensors", "manifest.json"} <= names
    resumed = in_process(tmp_path, resume=folder).fit()
    assert Catalogue(resumed.path / "checkpoints").steps() == [12]
    for name in ["model.safetensors", *(p.name for p in whole.path.glob("embeddings.*"))]:
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"embeddings": {"optimizer": {"name": "SGD", "lr": 1}}}, "embeddings.optimizer.name"),
        ({"steps": 8}, "nothing is left"),
    ],
)
def test_what_must_stay(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = in_process(tmp_path, steps=9).fit()
    with pytest.raises(SpecError, match=said):
        in_process(tmp_path, resume=whole.path, **more)


def test_the_field_must_stay(tmp_path: Path) -> None:
    whole = in_process(tmp_path, steps=9).fit()
    spec = job(0).model_copy(update={"embeddings": None})
    with pytest.raises(SpecError, match="the job does not have the field"):
        Trainer(spec, Words, resume=whole.path)


def plan(every: int, *, world: int = 1, asynchronous: bool = False, attempt: int = 0) -> TablePlan:
    embeddings = {"servers": 1, "asynchronous": asynchronous}
    spec = job(world, embeddings=embeddings)
    return plan_of(spec, "run", attempt, (SPEC,), 12, rewinds=False, checkpoint_every=every)


def gradient(step: int) -> list[RowGradients]:
    ids = np.array([step, step + 1, 40])
    return [RowGradients(0, ids, np.full((3, 3), step + 1.0, np.float32))]


def service(plan: TablePlan, steps: int) -> TableServer:
    """A server after some steps of one rank."""
    made = TableServer("server", 0)
    made.open(plan)
    for step in range(steps):
        made.add(PushId("run", 0, 0, step), gradient(step))
    return made


def test_copies_are_of_their_step_and_given_once() -> None:
    server = service(plan(4), 4)
    before = server.store.tables[0].copy()["rows"].tobytes()
    server.add(PushId("run", 0, 0, 4), gradient(4))
    steps, bundle = server.take_copies(4, 0.0)
    assert steps == 5
    assert bundle is not None
    assert assemble_tensors([bundle])["embeddings-0/t/rows"].data.tobytes() == before
    assert server.take_copies(4, 0.0) == (5, None)


def test_newer_copies_take_the_place_of_those_before_the_last() -> None:
    server = service(plan(2), 6)
    assert server.take_copies(2, 0.0) == (6, None)
    assert server.take_copies(4, 0.0)[1] is not None
    assert server.take_copies(6, 0.0)[1] is not None
    assert server.take_copies(8, 0.01) == (6, None)


def test_copies_of_asynchronous_tables_wait_for_the_slowest_rank() -> None:
    server = service(plan(2, world=2, asynchronous=True), 3)
    assert server.take_copies(2, 0.01) == (0, None)
    for step in range(2):
        server.add(PushId("run", 0, 1, step), gradient(step))
    assert server.take_copies(2, 0.0)[1] is not None


def test_a_checkpoint_without_its_tables_is_skipped() -> None:
    def here() -> ArrayRefs | None:
        return [("box", ())]

    def gone() -> ArrayRefs | None:
        return None

    for first, second, found in (
        (here, here, 2),
        (None, here, 1),
        (here, gone, 0),
        (gone, here, 0),
    ):
        fetch = CheckpointPart(fetch=first).also(second).fetch
        assert fetch is not None
        assert len(fetch() or []) == found


def files(bundle: Bundle | None) -> list[Any]:
    assert bundle is not None
    return [{k.partition("/")[2]: v for k, v in assemble_tensors([bundle]).items()}]


def test_tables_that_are_there_are_not_taken_from_a_checkpoint() -> None:
    server = service(plan(2), 3)
    saved = files(server.take_copies(2, 0.0)[1])
    now = server.store.tables[0].copy()["rows"].tobytes()
    assert server.open(plan(2, attempt=1), 2, saved) == 3
    assert server.store.tables[0].copy()["rows"].tobytes() == now


def test_a_damaged_checkpoint_leaves_no_half_tables() -> None:
    saved = files(service(plan(2), 2).take_copies(2, 0.0)[1])
    del saved[0]["t/sum"]
    fresh = TableServer("server", 0)
    with pytest.raises(ProtocolError, match="no table 't' of width 3 in the checkpoint: 'sum'"):
        fresh.open(plan(2), 2, saved)
    other = replace(plan(2), tables=(replace(SPEC, width=4),))
    with pytest.raises(ProtocolError, match="no table 't' of width 4"):
        fresh.open(other, 2, files(service(plan(2), 2).take_copies(2, 0.0)[1]))
    fresh.open(plan(2), 2, files(service(plan(2), 2).take_copies(2, 0.0)[1]))
    assert fresh.add(PushId("run", 0, 0, 2), gradient(2)).version == 3


def test_whole_tables_come_back_whole() -> None:
    whole = replace(plan(2), tables=(replace(SPEC, whole=True),))
    saved = files(service(whole, 2).take_copies(2, 0.0)[1])
    fresh = TableServer("server", 0)
    fresh.open(whole, 2, saved)
    assert fresh.sizes()[0][1] == 50
    assert torch.equal(
        *(torch.from_numpy(s.store.tables[0].copy()["rows"]) for s in (fresh, service(whole, 2)))
    )
