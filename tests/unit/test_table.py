"""Embedding tables compared with `nn.Embedding(sparse=True)` and torch's optimizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import save
from torch import nn

from distplat.platform.errors import StorageError
from distplat.platform.model_options import AnyRowOptimizer
from distplat.platform.shard_map import TableSpec
from distplat.strategies.sparse.files import (
    LIST_NAME,
    keep_tables,
    packed_part,
    read_list,
    read_part,
)
from distplat.strategies.sparse.rows import initial_rows
from distplat.strategies.sparse.table import RowGradients, Table, build_rule

SPEC = TableSpec("t", 60, 5, 1.0)
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.3},
    {"name": "Adagrad", "lr": 0.3, "initial_accumulator_value": 0.1},
    {"name": "SparseAdam", "lr": 0.03, "betas": [0.8, 0.95]},
]


def make_table(
    optimizer: dict[str, Any], *, rewinds: bool = False, spec: TableSpec = SPEC
) -> Table:
    rule = build_rule(TypeAdapter(AnyRowOptimizer).validate_python(optimizer))
    return Table(spec, 0, rule, rewinds=rewinds)


def read(table: Table, ids: Any) -> Any:
    out = np.empty((len(ids), table.spec.width), np.float32)
    table.read(np.asarray(ids, np.int64), out)
    return out


def gradients(step: int, rank: int = 0, rows: int = 12) -> RowGradients:
    rng = np.random.default_rng([step, rank])
    ids = rng.choice(60, rows, replace=False)
    return RowGradients(0, ids, rng.standard_normal((rows, 5)).astype(np.float32))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: str(o["name"]))
def test_updates_match_torch(options: dict[str, Any], ranks: int, block: int) -> None:
    actual = make_table(options)
    actual._block = block
    weight = torch.from_numpy(read(actual, range(60)))
    expected = nn.Embedding(60, 5, sparse=True, _weight=weight)
    optimizer_type = getattr(torch.optim, options["name"])
    optimizer = optimizer_type(
        expected.parameters(), **{k: v for k, v in options.items() if k != "name"}
    )
    for step in range(12):
        parts = [gradients(step, rank) for rank in range(ranks)]
        actual.apply(parts, options["lr"])
        ids = torch.from_numpy(np.concatenate([p.ids for p in parts]))
        values = torch.from_numpy(np.concatenate([p.values for p in parts]))
        expected.weight.grad = torch.sparse_coo_tensor(
            ids[None], values, (60, 5), check_invariants=True
        )
        optimizer.step()
    np.testing.assert_allclose(
        read(actual, range(60)), expected.weight.detach(), rtol=2e-5, atol=1e-6
    )


def test_row_wise_adagrad_matches_hand_computed_values() -> None:
    adagrad_table = make_table({"name": "RowWiseAdagrad", "lr": 0.5, "eps": 1e-3})
    before = read(adagrad_table, [4])
    gradient = np.array([[1, 2, 0, 0, 2]], np.float32)  # mean square 9/5
    for _ in range(2):
        adagrad_table.apply([RowGradients(0, np.array([4]), gradient)], 0.5)
    update = 0.5 * gradient * (1 / (1.8**0.5 + 1e-3) + 1 / (3.6**0.5 + 1e-3))
    np.testing.assert_allclose(read(adagrad_table, [4]), before - update, rtol=1e-5)
    assert adagrad_table.state_bytes == (5 + 1) * 4


def test_rows_are_created_by_their_first_gradient() -> None:
    sgd_table = make_table(OPTIMIZERS[0])
    initial = read(sgd_table, [3, 3, 9])
    assert len(sgd_table) == 0
    assert np.array_equal(initial, initial_rows(SPEC, 0, np.array([3, 3, 9])))
    sgd_table.apply([RowGradients(0, np.array([9]), np.ones((1, 5), np.float32))], 1.0)
    assert sgd_table.ids().tolist() == [9]
    assert np.array_equal(read(sgd_table, [3, 9]), initial[1:] - np.array([[0], [1]], np.float32))


def test_gradients_are_summed_in_rank_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 from left to right, and 1 in another order."""
    spec = TableSpec("t", 60, 1, 0.0)
    values = [1e8, 1.0, -1e8]
    parts = [RowGradients(0, np.array([2]), np.full((1, 1), v, np.float32)) for v in values]
    ordered, reordered = make_table(OPTIMIZERS[0], spec=spec), make_table(OPTIMIZERS[0], spec=spec)
    ordered.apply(parts, 1.0)
    reordered.apply([parts[0], parts[2], parts[1]], 1.0)
    assert read(ordered, [2]).item() == 0.0
    assert read(reordered, [2]).item() == -1.0


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: str(o["name"]))
def test_repeated_step_after_rewind_is_bit_identical(options: dict[str, Any]) -> None:
    plain, rewound = make_table(options), make_table(options, rewinds=True)
    for step in range(6):
        parts = [gradients(step, rank) for rank in range(2)]
        plain.apply(parts, 0.1)
        before = read(rewound, range(60))
        rewound.apply(parts, 0.1)
        if step % 2:
            rewound.rewind()
            assert np.array_equal(read(rewound, range(60)), before)
            rewound.rewind()  # a second call has no effect
            rewound.apply(parts, 0.1)
    assert np.array_equal(read(plain, range(60)), read(rewound, range(60)))


def test_forgotten_step_is_not_rewound() -> None:
    sgd_table = make_table(OPTIMIZERS[0], rewinds=True)
    sgd_table.apply([gradients(0)], 0.1)
    after = read(sgd_table, range(60))
    sgd_table.forget()
    sgd_table.rewind()
    assert np.array_equal(read(sgd_table, range(60)), after)


def test_rewind_buffer_grows() -> None:
    adagrad_table = make_table(OPTIMIZERS[1], rewinds=True)
    for step, rows in enumerate((2, 50, 3)):
        before = read(adagrad_table, range(60))
        adagrad_table.apply([gradients(step, rows=rows)], 0.1)
    adagrad_table.rewind()
    assert np.array_equal(read(adagrad_table, range(60)), before)


def test_round_trip_of_tables_with_any_name(tmp_path: Path) -> None:
    """A module name in torch may contain any character except a dot."""
    names = ["emb.user/id", "../out", "n" * 300, "a_b", "a/b", "ü"]
    tables = []
    for number, name in enumerate(names):
        tables.append(make_table(OPTIMIZERS[0], spec=TableSpec(name, 60, 5, 1.0)))
        tables[-1].put(np.arange(3), np.full((3, 5), number, np.float32))

    class Server:
        def sizes(self) -> list[tuple[TableSpec, int]]:
            return [(saved.spec, 3) for saved in tables]

        def part(self, number: int, first: int, count: int) -> bytes:
            return packed_part(tables[number], first, count)

    run = tmp_path / "run"
    run.mkdir()
    keep_tables([Server()], 5, lambda name, data: (run / name).write_bytes(data))
    assert [*tmp_path.iterdir()] == [run]
    seed, loaded = read_list(run)
    assert (seed, [*loaded]) == (5, names)
    for number, (spec, files) in enumerate(loaded.values()):
        restored = make_table(OPTIMIZERS[0], spec=spec)
        for file in files:
            read_part(file, restored)
        assert (read(restored, range(3)) == number).all()


ENTRY = {"name": "t", "files": ["part"], "rows": 60, "width": 5, "std": 1.0}


@pytest.mark.parametrize(
    "tables",
    [
        ["t"],
        [[]],
        [{**ENTRY, "files": ["../part"]}],
        [{**ENTRY, "files": ["/etc/part"]}],
        [{**ENTRY, "files": [None]}],
        [{**ENTRY, "more": 1}],
        {"t": ENTRY},
    ],
)
def test_rejects_invalid_list_of_tables(tables: object, tmp_path: Path) -> None:
    (tmp_path / LIST_NAME).write_text(json.dumps({"seed": 1, "tables": tables}))
    with pytest.raises(StorageError, match="no embedding tables in"):
        read_list(tmp_path)


IDS, ROWS = np.arange(6), np.ones((6, 5), np.float32)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (IDS, np.ones((15, 2), np.float32), r"it has int64 of shape \(6,\), float32 of shape"),
        (IDS, ROWS[:1], r"float32 of shape \(1, 5\)"),
        (IDS, ROWS.astype(np.float64), "float64"),
        (IDS.astype(np.int32), ROWS, "int32"),
        (IDS.reshape(6, 1), ROWS, r"int64 of shape \(6, 1\)"),
        (np.array(3), ROWS, r"int64 of shape \(\)"),
        (IDS + 55, ROWS, "it has ids from 55 to 60"),
        (IDS - 1, ROWS, "it has ids from -1 to 4"),
    ],
)
def test_rejects_part_of_another_table(
    ids: NDArray[Any], rows: NDArray[Any], message: str, tmp_path: Path
) -> None:
    sgd_table = make_table(OPTIMIZERS[0], spec=TableSpec("t", 60, 5, 1.0))
    (tmp_path / "part").write_bytes(save({"ids": ids, "rows": rows}))
    with pytest.raises(StorageError, match=f"is no part of table 't': .*{message}"):
        read_part(tmp_path / "part", sgd_table)
    assert len(sgd_table.ids()) == 0


def test_reports_damaged_part(tmp_path: Path) -> None:
    valid = save({"ids": IDS, "rows": ROWS})
    for damaged in (b"", valid[:-1], valid.replace(b"I64", b"I6?"), b"x" * 100):
        (tmp_path / "part").write_bytes(damaged)
        with pytest.raises(StorageError, match="is no part of an embedding table"):
            read_part(tmp_path / "part", make_table(OPTIMIZERS[0], spec=TableSpec("t", 60, 5, 1.0)))
