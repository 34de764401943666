"""Embedding tables in checkpoints: resumed runs are bit-identical to uninterrupted ones."""

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


def state_of(run: LocalRun) -> dict[str, Any]:
    """Return the model and the tables, with rows sorted by id."""
    contents: dict[str, Any] = {k: v.numpy().tobytes() for k, v in run.parameters().items()}
    for number in range(2):
        tables = [server.store.tables[number].copy() for server in run.tables.table_servers]
        ids = np.concatenate([table.pop("ids") for table in tables])
        for name in tables[0]:
            values = np.concatenate([table[name] for table in tables])
            contents[f"{number}/{name}"] = values[np.argsort(ids)].tobytes()
        contents[f"{number}/ids"] = np.sort(ids).tolist()
        contents[f"{number}/step"] = {
            s.store.tables[number].updates for s in run.tables.table_servers
        }
    return contents


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_resumed_run_is_bit_identical(strategy: str, optimizer: str) -> None:
    spec = job(2, optimizer, strategy=strategy)
    uninterrupted = train(spec, Words)
    assert sorted(uninterrupted.checkpoints) == [4, 8, 12]
    for step in (4, 8):
        assert state_of(train(spec, Words, saved=uninterrupted.checkpoints[step])) == state_of(
            uninterrupted
        )


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "embeddings", [{"servers": 1}, {"servers": 3}, {"partition": "range"}], ids=str
)
def test_resumes_with_different_servers(embeddings: dict[str, Any]) -> None:
    uninterrupted = train(job(2), Words)
    resumed = train(job(2, embeddings=embeddings), Words, saved=uninterrupted.checkpoints[4])
    actual, expected = state_of(resumed), state_of(uninterrupted)
    # Not bit-identical: torch's bag sums a row's gradients in the order of the rows.
    for name in ("0/rows", "0/sum", "1/rows", "1/sum", "head.weight"):
        first, second = (
            np.frombuffer(contents[name], np.float32) for contents in (actual, expected)
        )
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    assert actual["0/ids"] == expected["0/ids"]


@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_asynchronous_tables_with_one_rank(strategy: str) -> None:
    spec = job(1, strategy=strategy, embeddings={"asynchronous": True})
    uninterrupted = train(spec, Words)
    resumed = train(spec, Words, saved=uninterrupted.checkpoints[8])
    assert state_of(resumed) == state_of(uninterrupted)


def test_asynchronous_tables_with_several_ranks() -> None:
    spec = job(3, strategy="ps-async", embeddings={"asynchronous": True})
    uninterrupted = train(spec, Words)
    resumed = train(
        spec, Words, saved=uninterrupted.checkpoints[12 if 12 in uninterrupted.checkpoints else 8]
    )
    assert state_of(resumed).keys() == state_of(uninterrupted).keys()


class Wider(Words):
    def model(self) -> nn.Module:
        return Net(ShardedEmbedding(41, WIDTH), ShardedEmbeddingBag(40, WIDTH, padding_idx=0))


def test_rejects_checkpoint_of_different_tables() -> None:
    uninterrupted = train(job(1), Words)
    with pytest.raises(SpecError, match="'words' has rows 41, had 40"):
        train(job(1), Wider, saved=uninterrupted.checkpoints[4])


def trainer(tmp_path: Path, resume: Path | None = None, **more: Any) -> Any:
    return Trainer(job(0, storage_path=str(tmp_path), **more), Words, resume=resume)


def test_resumes_from_files(tmp_path: Path) -> None:
    uninterrupted = trainer(tmp_path).fit()
    folder = uninterrupted.path / "checkpoints" / "step-000008"
    names = {path.name for path in folder.iterdir()}
    assert {"embeddings-0.safetensors", "embeddings-1.safetensors", "manifest.json"} <= names
    resumed = trainer(tmp_path, resume=folder).fit()
    assert Catalogue(resumed.path / "checkpoints").steps() == [12]
    for name in ["model.safetensors", *(p.name for p in uninterrupted.path.glob("embeddings.*"))]:
        assert (resumed.path / name).read_bytes() == (uninterrupted.path / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embeddings": {"optimizer": {"name": "SGD", "lr": 1}}}, "embeddings.optimizer.name"),
        ({"steps": 8}, "nothing is left"),
    ],
)
def test_rejects_changed_job(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    first = trainer(tmp_path, steps=9).fit()
    with pytest.raises(SpecError, match=message):
        trainer(tmp_path, resume=first.path, **fields)


def test_rejects_job_without_embeddings(tmp_path: Path) -> None:
    first = trainer(tmp_path, steps=9).fit()
    spec = job(0).model_copy(update={"embeddings": None})
    with pytest.raises(SpecError, match="the job does not have the field"):
        Trainer(spec, Words, resume=first.path)


def plan(every: int, *, world: int = 1, asynchronous: bool = False, attempt: int = 0) -> TablePlan:
    embeddings = {"servers": 1, "asynchronous": asynchronous}
    spec = job(world, embeddings=embeddings)
    return plan_of(spec, "run", attempt, (SPEC,), 12, rewinds=False, checkpoint_every=every)


def gradient(step: int) -> list[RowGradients]:
    ids = np.array([step, step + 1, 40])
    return [RowGradients(0, ids, np.full((3, 3), step + 1.0, np.float32))]


def make_server(plan: TablePlan, steps: int) -> TableServer:
    """Return a server after some steps of one rank."""
    server = TableServer("server", 0)
    server.open(plan)
    for step in range(steps):
        server.add(PushId("run", 0, 0, step), gradient(step))
    return server


def test_copy_is_of_its_step_and_returned_once() -> None:
    server = make_server(plan(4), 4)
    before = server.store.tables[0].copy()["rows"].tobytes()
    server.add(PushId("run", 0, 0, 4), gradient(4))
    steps, bundle = server.take_copies(4, 0.0)
    assert steps == 5
    assert bundle is not None
    assert assemble_tensors([bundle])["embeddings-0/t/rows"].data.tobytes() == before
    assert server.take_copies(4, 0.0) == (5, None)


def test_only_last_copies_are_stored() -> None:
    server = make_server(plan(2), 6)
    assert server.take_copies(2, 0.0) == (6, None)
    assert server.take_copies(4, 0.0)[1] is not None
    assert server.take_copies(6, 0.0)[1] is not None
    assert server.take_copies(8, 0.01) == (6, None)


def test_copies_of_asynchronous_tables_wait_for_the_slowest_rank() -> None:
    server = make_server(plan(2, world=2, asynchronous=True), 3)
    assert server.take_copies(2, 0.01) == (0, None)
    for step in range(2):
        server.add(PushId("run", 0, 1, step), gradient(step))
    assert server.take_copies(2, 0.0)[1] is not None


def test_checkpoint_without_tables_is_skipped() -> None:
    def complete() -> ArrayRefs | None:
        return [("box", ())]

    def missing() -> ArrayRefs | None:
        return None

    for first, second, length in (
        (complete, complete, 2),
        (None, complete, 1),
        (complete, missing, 0),
        (missing, complete, 0),
    ):
        fetch = CheckpointPart(fetch=first).also(second).fetch
        assert fetch is not None
        assert len(fetch() or []) == length


def checkpoint_of(bundle: Bundle | None) -> list[Any]:
    assert bundle is not None
    return [{k.partition("/")[2]: v for k, v in assemble_tensors([bundle]).items()}]


def test_open_keeps_existing_tables() -> None:
    server = make_server(plan(2), 3)
    saved = checkpoint_of(server.take_copies(2, 0.0)[1])
    current_rows = server.store.tables[0].copy()["rows"].tobytes()
    assert server.open(plan(2, attempt=1), 2, saved) == 3
    assert server.store.tables[0].copy()["rows"].tobytes() == current_rows


def test_damaged_checkpoint_leaves_no_partial_tables() -> None:
    saved = checkpoint_of(make_server(plan(2), 2).take_copies(2, 0.0)[1])
    del saved[0]["t/sum"]
    server = TableServer("server", 0)
    with pytest.raises(ProtocolError, match="no table 't' of width 3 in the checkpoint: 'sum'"):
        server.open(plan(2), 2, saved)
    other_plan = replace(plan(2), tables=(replace(SPEC, width=4),))
    with pytest.raises(ProtocolError, match="no table 't' of width 4"):
        server.open(other_plan, 2, checkpoint_of(make_server(plan(2), 2).take_copies(2, 0.0)[1]))
    server.open(plan(2), 2, checkpoint_of(make_server(plan(2), 2).take_copies(2, 0.0)[1]))
    assert server.add(PushId("run", 0, 0, 2), gradient(2)).version == 3


def test_whole_tables_are_restored_completely() -> None:
    whole_plan = replace(plan(2), tables=(replace(SPEC, whole=True),))
    saved = checkpoint_of(make_server(whole_plan, 2).take_copies(2, 0.0)[1])
    server = TableServer("server", 0)
    server.open(whole_plan, 2, saved)
    assert server.sizes()[0][1] == 50
    assert torch.equal(
        *(
            torch.from_numpy(table_server.store.tables[0].copy()["rows"])
            for table_server in (server, make_server(whole_plan, 2))
        )
    )
