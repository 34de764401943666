"""A table against torch: `nn.Embedding(sparse=True)` under torch's own optimizers."""

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


def table(optimizer: dict[str, Any], *, rewinds: bool = False, spec: TableSpec = SPEC) -> Table:
    rule = build_rule(TypeAdapter(AnyRowOptimizer).validate_python(optimizer))
    return Table(spec, 0, rule, rewinds=rewinds)


def read(table: Table, ids: Any) -> Any:
    out = np.empty((len(ids), table.spec.width), np.float32)
    table.read(np.asarray(ids, np.int64), out)
    return out


def gradients(step: int, rank: int = 0, rows: int = 12) -> RowGradients:
    random = np.random.default_rng([step, rank])
    ids = random.choice(60, rows, replace=False)
    return RowGradients(0, ids, random.standard_normal((rows, 5)).astype(np.float32))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: str(o["name"]))
def test_updates_as_torch_does(options: dict[str, Any], ranks: int, block: int) -> None:
    mine = table(options)
    mine._block = block
    weight = torch.from_numpy(read(mine, range(60)))
    theirs = nn.Embedding(60, 5, sparse=True, _weight=weight)
    kind = getattr(torch.optim, options["name"])
    optimizer = kind(theirs.parameters(), **{k: v for k, v in options.items() if k != "name"})
    for step in range(12):
        parts = [gradients(step, rank) for rank in range(ranks)]
        mine.apply(parts, options["lr"])
        ids = torch.from_numpy(np.concatenate([p.ids for p in parts]))
        values = torch.from_numpy(np.concatenate([p.values for p in parts]))
        theirs.weight.grad = torch.sparse_coo_tensor(
            ids[None], values, (60, 5), check_invariants=True
        )
        optimizer.step()
    np.testing.assert_allclose(read(mine, range(60)), theirs.weight.detach(), rtol=2e-5, atol=1e-6)


def test_row_wise_adagrad_by_hand() -> None:
    mine = table({"name": "RowWiseAdagrad", "lr": 0.5, "eps": 1e-3})
    before = read(mine, [4])
    gradient = np.array([[1, 2, 0, 0, 2]], np.float32)  # mean square 9/5
    for _ in range(2):
        mine.apply([RowGradients(0, np.array([4]), gradient)], 0.5)
    moved = 0.5 * gradient * (1 / (1.8**0.5 + 1e-3) + 1 / (3.6**0.5 + 1e-3))
    np.testing.assert_allclose(read(mine, [4]), before - moved, rtol=1e-5)
    assert mine.state_bytes == (5 + 1) * 4


def test_rows_come_with_their_first_gradient() -> None:
    mine = table(OPTIMIZERS[0])
    first = read(mine, [3, 3, 9])
    assert len(mine) == 0
    assert np.array_equal(first, initial_rows(SPEC, 0, np.array([3, 3, 9])))
    mine.apply([RowGradients(0, np.array([9]), np.ones((1, 5), np.float32))], 1.0)
    assert mine.ids().tolist() == [9]
    assert np.array_equal(read(mine, [3, 9]), first[1:] - np.array([[0], [1]], np.float32))


def test_sums_are_in_rank_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 from the left, 1 in another order."""
    spec = TableSpec("t", 60, 1, 0.0)
    values = [1e8, 1.0, -1e8]
    parts = [RowGradients(0, np.array([2]), np.full((1, 1), v, np.float32)) for v in values]
    mine, other = table(OPTIMIZERS[0], spec=spec), table(OPTIMIZERS[0], spec=spec)
    mine.apply(parts, 1.0)
    other.apply([parts[0], parts[2], parts[1]], 1.0)
    assert read(mine, [2]).item() == 0.0
    assert read(other, [2]).item() == -1.0


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: str(o["name"]))
def test_a_step_taken_back_and_made_again_has_the_same_bits(options: dict[str, Any]) -> None:
    plain, rewound = table(options), table(options, rewinds=True)
    for step in range(6):
        parts = [gradients(step, rank) for rank in range(2)]
        plain.apply(parts, 0.1)
        before = read(rewound, range(60))
        rewound.apply(parts, 0.1)
        if step % 2:
            rewound.rewind()
            assert np.array_equal(read(rewound, range(60)), before)
            rewound.rewind()  # a second time does nothing
            rewound.apply(parts, 0.1)
    assert np.array_equal(read(plain, range(60)), read(rewound, range(60)))


def test_what_is_forgotten_is_not_taken_back() -> None:
    mine = table(OPTIMIZERS[0], rewinds=True)
    mine.apply([gradients(0)], 0.1)
    after = read(mine, range(60))
    mine.forget()
    mine.rewind()
    assert np.array_equal(read(mine, range(60)), after)


def test_what_is_kept_grows_with_the_step() -> None:
    mine = table(OPTIMIZERS[1], rewinds=True)
    for step, rows in enumerate((2, 50, 3)):
        before = read(mine, range(60))
        mine.apply([gradients(step, rows=rows)], 0.1)
    mine.rewind()
    assert np.array_equal(read(mine, range(60)), before)


def test_tables_of_any_name_are_written_and_read(tmp_path: Path) -> None:
    """Torch forbids a dot alone in the name of a module."""
    names = ["emb.user/id", "../out", "n" * 300, "a_b", "a/b", "ü"]
    kept = []
    for number, name in enumerate(names):
        kept.append(table(OPTIMIZERS[0], spec=TableSpec(name, 60, 5, 1.0)))
        kept[-1].put(np.arange(3), np.full((3, 5), number, np.float32))

    class Server:
        def sizes(self) -> list[tuple[TableSpec, int]]:
            return [(one.spec, 3) for one in kept]

        def part(self, number: int, first: int, count: int) -> bytes:
            return packed_part(kept[number], first, count)

    run = tmp_path / "run"
    run.mkdir()
    keep_tables([Server()], 5, lambda name, data: (run / name).write_bytes(data))
    assert [*tmp_path.iterdir()] == [run]
    seed, found = read_list(run)
    assert (seed, [*found]) == (5, names)
    for number, (spec, files) in enumerate(found.values()):
        again = table(OPTIMIZERS[0], spec=spec)
        for file in files:
            read_part(file, again)
        assert (read(again, range(3)) == number).all()


LISTED = {"name": "t", "files": ["part"], "rows": 60, "width": 5, "std": 1.0}


@pytest.mark.parametrize(
    "tables",
    [
        ["t"],
        [[]],
        [{**LISTED, "files": ["../part"]}],
        [{**LISTED, "files": ["/etc/part"]}],
        [{**LISTED, "files": [None]}],
        [{**LISTED, "more": 1}],
        {"t": LISTED},
    ],
)
def test_a_list_of_tables_that_is_none_of_ours(tables: object, tmp_path: Path) -> None:
    (tmp_path / LIST_NAME).write_text(json.dumps({"seed": 1, "tables": tables}))
    with pytest.raises(StorageError, match="no embedding tables in"):
        read_list(tmp_path)


IDS, ROWS = np.arange(6), np.ones((6, 5), np.float32)


@pytest.mark.parametrize(
    ("ids", "rows", "said"),
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
def test_a_part_of_another_table(
    ids: NDArray[Any], rows: NDArray[Any], said: str, tmp_path: Path
) -> None:
    mine = table(OPTIMIZERS[0], spec=TableSpec("t", 60, 5, 1.0))
    (tmp_path / "part").write_bytes(save({"ids": ids, "rows": rows}))
    with pytest.raises(StorageError, match=f"is no part of table 't': .*{said}"):
        read_part(tmp_path / "part", mine)
    assert len(mine.ids()) == 0


def test_a_damaged_part_of_a_table_is_told(tmp_path: Path) -> None:
    whole = save({"ids": IDS, "rows": ROWS})
    for damaged in (b"", whole[:-1], whole.replace(b"I64", b"I6?"), b"x" * 100):
        (tmp_path / "part").write_bytes(damaged)
        with pytest.raises(StorageError, match="is no part of an embedding table"):
            read_part(tmp_path / "part", table(OPTIMIZERS[0], spec=TableSpec("t", 60, 5, 1.0)))
