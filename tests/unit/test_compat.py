"""What is private of Ray and torch is still there, and does what we take it for."""

import inspect
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import requests
import torch
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray.experimental import internal_kv
from ray.job_submission import JobSubmissionClient
from torch import Tensor, nn

from distplat.actors import ray_compat as of_ray
from distplat.actors.ray_folder import RayFolder
from distplat.actors.task_loading import SHIPPED
from distplat.strategies import torch_compat as of_torch
from distplat.strategies.model import module_hooks

ROOT = Path(__file__).resolve().parents[2]
REGISTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    *module_hooks._CALL_HOOKS,
    *module_hooks._STATE_DICT_HOOKS,
)


# Ray


class Store(dict[bytes, bytes]):
    """Stands in for the client of Ray's key-value store, as the functions over it call it."""

    def internal_kv_put(
        self, key: bytes, value: bytes, overwrite: bool, namespace: object = None
    ) -> bool:
        if overwrite or key not in self:
            self[key] = value
        return True

    def internal_kv_get(self, key: bytes, namespace: object = None) -> bytes | None:
        return self.get(key)

    def internal_kv_keys(self, prefix: bytes, namespace: object = None) -> list[bytes]:
        return [one for one in self if one.startswith(prefix)]

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: object = None) -> int:
        gone = [one for one in self if one == key or (by_prefix and one.startswith(key))]
        for one in gone:
            del self[one]
        return len(gone)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(internal_kv, "global_gcs_client", store)
    monkeypatch.setattr(internal_kv, "_initialized", True)
    return store


def test_the_store_keeps_the_first_value(store: Store) -> None:
    of_ray.put_first(b"a/1", b"one")
    of_ray.put_first(b"a/1", b"two")
    assert of_ray.get(b"a/1") == b"one"
    assert of_ray.get(b"b") is None


def test_the_store_lists_writes_again_and_removes(store: Store) -> None:
    store |= {b"a": b"", b"a/1": b""}
    of_ray.put(b"a/1", b"one")
    of_ray.put(b"a/1", b"two")
    assert of_ray.get(b"a/1") == b"two"
    assert of_ray.keys(b"a/") == [b"a/1"]
    of_ray.delete(b"a/1")
    assert [*store] == [b"a"]


def test_the_store_forgets_a_run(store: Store) -> None:
    for key in (b"a/1", b"a/2", b"b"):
        of_ray.put_first(key, b"x")
    of_ray.delete_all(b"a/")
    assert store == {b"b": b"x"}


def test_free_resources_are_asked_for_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        def available_resources_per_node(self) -> dict[str, dict[str, float]]:
            return {"node": {"CPU": 2.0}}

    monkeypatch.setattr(ray._private.state, "state", State())
    assert of_ray.free_resources() == {"node": {"CPU": 2.0}}


def test_a_ray_is_ours_if_this_process_has_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not of_ray.ray_is_ours()
    head = type("Node", (), {"head": True})()
    monkeypatch.setattr(ray._private.worker, "_global_node", head)
    assert of_ray.ray_is_ours()
    assert "self.head = " in inspect.getsource(ray._private.node.Node)


def test_rays_logs_are_where_its_node_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_ray.log_folder() is None
    node = SimpleNamespace(get_logs_dir_path=lambda: Path("/there/logs"))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    assert of_ray.log_folder() == "/there/logs"
    assert callable(ray._private.node.Node.get_logs_dir_path)


def test_a_ray_of_ours_takes_loopback_for_its_address() -> None:
    from ray._private import services

    with of_ray.loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.ray_constants.ENABLE_RAY_CLUSTER


def test_ray_takes_no_signal_while_it_starts() -> None:
    """It would end the process by `sys.exit`, and an end in order would look like the user's."""
    for module in (ray._private.worker, ray._private.node):
        assert "ray._private.utils.set_sigterm_handler(" in inspect.getsource(module)
    before = signal.getsignal(signal.SIGTERM)
    with of_ray.own_signals():
        ray._private.utils.set_sigterm_handler(lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
    ray._private.utils.set_sigterm_handler(before)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_files_of_a_ray_of_ours_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is too long for a socket would keep Ray from starting."""
    with TemporaryDirectory(prefix="t") as short:
        monkeypatch.chdir(short)
        longest = f"{short}/{'x' * (of_ray.FOLDER_BYTES - len(short) - 1)}"
        for base, there in ((longest, longest), ("new", f"{short}/new"), (f"{longest}x", "/tmp")):
            monkeypatch.setenv("RAY_TMPDIR", base)
            made = RayFolder(of_ray.temporary_folder())
            folder = made.path.parent
            assert (folder.parent, folder.stat().st_mode & 0o777) == (Path(there), 0o700)
            made.remove()
            assert not folder.exists()


def test_ray_notes_its_address_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    ray._private.utils.write_ray_address("10.0.0.1:6379", None)
    assert of_ray.address_file() == tmp_path / "ray/ray_current_cluster"
    assert of_ray.address_file().read_text() == "10.0.0.1:6379"


def test_auto_is_what_ray_start_noted_or_any_rays_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    running: set[str] = set()
    monkeypatch.setattr(ray._private.services, "find_gcs_addresses", lambda: running)
    with pytest.raises(ConnectionError, match="Could not find any running Ray"):
        of_ray.address_of_auto()
    running.add("10.0.0.2:6379")
    assert of_ray.address_of_auto() == "10.0.0.2:6379"
    running.clear()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert of_ray.address_of_auto() == "10.0.0.1:6379"


@pytest.mark.parametrize("real", [0, os.getuid(), os.getuid() + 1])
def test_rays_are_looked_for_among_ones_own_processes(
    real: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["/lib/ray/raylet", "--gcs-address=10.0.0.3:6379", "--more"]
    infos = [
        {"cmdline": line, "uids": SimpleNamespace(real=real, effective=0)},
        {"cmdline": ["python", *line[1:]], "uids": SimpleNamespace(real=0)},
        {"cmdline": None, "uids": None},  # it has ended, or may not be looked at
    ]
    processes = [SimpleNamespace(info=info) for info in infos]
    monkeypatch.setattr(psutil, "process_iter", lambda fields: iter(processes))
    assert of_ray.addresses_here() == ({"10.0.0.3:6379"} if real in (0, os.getuid()) else set())


def test_a_process_of_ray_tells_its_address(tmp_path: Path) -> None:
    line = ["raylet", "-c", "print(flush=True); input()", "--gcs-address=127.0.0.1:1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, executable=sys.executable, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.read(1)
        assert "127.0.0.1:1" in of_ray.addresses_here()
        process.stdin.close()
    assert "--gcs-address={" in inspect.getsource(ray._private.services)


def test_a_head_is_met_without_a_driver() -> None:
    """What it raises shows `test_jobs.py`: alone it takes seconds to find that nobody is there."""
    told = inspect.getdoc(ray._raylet.InnerGcsClient.standalone)
    wanted = "standalone(unicode gcs_address: str, cluster_id: Optional[str], int timeout_ms: int)"
    assert told is not None and wanted in told


def test_ignore_files_are_read_as_ray_reads_them(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text("*.bin\n")
    tests = of_ray.ignore_tests(tmp_path, logging.getLogger("test"))
    assert any(test(tmp_path / "a.bin") for test in tests)
    assert not any(test(tmp_path / "a.py") for test in tests)


@pytest.mark.parametrize(("told", "ignored"), [(None, True), ("0", True), ("1", False)])
def test_rays_variable_says_whether_git_is_heeded(
    told: str | None, ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, raising=False)
    if told is not None:
        monkeypatch.setenv(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, told)
    (tmp_path / ".gitignore").write_text("*.bin\n")
    tests = of_ray.ignore_tests(tmp_path, logging.getLogger("test"))
    assert any(test(tmp_path / "a.bin") for test in tests) is ignored


def test_a_job_config_tells_where_modules_are() -> None:
    config = of_ray.job_config("/home/user", one_machine=False)
    assert "/home/user" in config._py_driver_sys_path
    assert b"/home/user" in config._get_proto_job_config().SerializeToString()


@pytest.mark.parametrize("one_machine", [True, False])
def test_actors_learn_from_the_job_whether_it_is_for_one_machine(
    one_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they get it, in `Worker.core_worker`, shows `test_jobs.py`."""
    sent = of_ray.job_config("/home/user", one_machine=one_machine)._get_proto_job_config()
    core = SimpleNamespace(get_job_config=lambda: sent)
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace(core_worker=core))
    assert of_ray.stays_on_machine() is one_machine


def test_a_driver_of_ray_client_has_joined_for_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace())
    assert not of_ray.stays_on_machine()


def test_the_variable_of_a_job_is_the_one_that_ray_reads() -> None:
    assert of_ray.JOB_CONFIG_VARIABLE == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    source = inspect.getsource(ray._private.worker)
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in source


def test_every_request_of_the_job_client_goes_through_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[str, str, object]] = []

    def answer(method: str, url: str, **kwargs: Any) -> None:
        sent.append((method, url, kwargs["timeout"]))
        raise requests.Timeout

    def request(client: Any, send: Any, method: str, endpoint: str, **kwargs: Any) -> Any:
        assert client.get_address() == "http://127.0.0.1:1"
        return send(method, endpoint, timeout=5, **kwargs)

    monkeypatch.setattr("requests.request", answer)
    with pytest.raises(requests.Timeout):
        of_ray.with_requests(JobSubmissionClient, request)("http://127.0.0.1:1")
    assert sent == [("GET", "http://127.0.0.1:1/api/version", 5)]


def test_what_ray_has_shipped_is_known_by_its_name() -> None:
    from ray._private.runtime_env import packaging

    assert packaging.RAY_PKG_PREFIX == SHIPPED


def test_the_loggers_of_uploads_have_these_names() -> None:
    import ray.dashboard.modules.dashboard_sdk as sdk
    from ray._private.runtime_env import packaging

    for module in (sdk, packaging):
        assert any(module.__name__.startswith(name) for name in of_ray.LOGGERS)


# torch


@pytest.mark.parametrize("name", sorted(set(REGISTRIES)))
def test_modules_have_the_registries(name: str) -> None:
    assert name in vars(nn.Linear(1, 1))


def test_hooks_of_tensors_are_where_they_are_looked_for() -> None:
    tensor = torch.zeros(1, requires_grad=True)
    assert module_hooks.tensor_hooks(tensor) == []
    tensor.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    tensor.register_post_accumulate_grad_hook(len)  # type: ignore[no-untyped-call]
    assert module_hooks.tensor_hooks(tensor) == ["a hook", "a post-accumulate hook"]


def test_a_tensor_counts_its_writes() -> None:
    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


@pytest.mark.parametrize(
    "kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d]
)
def test_norms_with_running_statistics_are_told(kind: Any) -> None:
    assert of_torch.has_running_statistics(kind(2))
    assert not of_torch.has_running_statistics(nn.LayerNorm(2))


def test_an_input_of_the_wrong_shape_is_refused() -> None:
    of_torch.check_input(nn.SyncBatchNorm(2), torch.zeros(3, 2))
    with pytest.raises(ValueError):
        of_torch.check_input(nn.SyncBatchNorm(2), torch.zeros(3))


def test_hooks_for_all_modules_are_seen() -> None:
    assert not of_torch.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert of_torch.has_global_hooks()
    finally:
        handle.remove()


def test_samples_are_collated_by_our_rules() -> None:
    rules = {**of_torch.COLLATE_RULES, str: lambda batch, **_: "".join(batch)}
    together = of_torch.collate_with_rules(
        rules, [{"x": torch.ones(1), "t": "a"}, {"x": torch.ones(1), "t": "b"}]
    )
    assert together["t"] == "ab" and together["x"].shape == (2, 1)


def assert_runs(code: str) -> None:
    """Run it in a process of its own: the compiler, and what it is told, stay out of this one."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_not_compiled_is_known_without_a_compiler() -> None:
    ask = """import sys
from torch import nn
from distplat.strategies.torch_compat import compiled_module
assert compiled_module(nn.Linear(1, 1)) is None
assert "torch._dynamo" not in sys.modules"""
    assert_runs(ask)


def test_calls_go_through_a_compiler_that_is_given() -> None:
    module, calls = nn.Linear(2, 1), []

    def context(call: Any) -> Any:
        def compiled(*args: Any) -> Any:
            calls.append(args)
            return call(*args)

        return compiled

    of_torch.call_compiled(module, context)
    inputs = torch.ones(3, 2)
    assert torch.equal(module(inputs), module.forward(inputs))
    assert len(calls) == 1


def test_the_first_step_of_an_optimizer_imports_no_compiler() -> None:
    ask = """import sys, torch
from distplat.strategies.torch_compat import avoid_compiler_import
avoid_compiler_import()
torch.optim.SGD([torch.zeros(1)], lr=0.1)
sys.exit("torch._dynamo" in sys.modules)"""
    assert_runs(ask)


def test_the_end_of_backward_is_told_and_its_error_comes_out() -> None:
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]
    told: list[list[bool]] = []

    def queue(_: Tensor) -> None:
        of_torch.after_backward(lambda: told.append([one.grad is not None for one in weights]))

    hook = weights[0].register_post_accumulate_grad_hook(queue)  # type: ignore[no-untyped-call]
    torch.autograd.backward(weights[0] * weights[1])
    assert told == [[True, True]]

    def fail() -> None:
        raise KeyError("at the end")

    hook.remove()
    weights[0].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _: of_torch.after_backward(fail)
    )
    with pytest.raises(KeyError, match="at the end"):
        torch.autograd.backward(weights[0] * weights[1])


def test_trees_are_gone_through_in_order() -> None:
    tree = {"b": [torch.ones(1), (2, None)], "a": 3}
    leaves = of_torch.tree_leaves(tree)
    assert [leaf if not isinstance(leaf, Tensor) else "t" for leaf in leaves] == ["t", 2, None, 3]
    doubled = of_torch.tree_map(lambda leaf: leaf if leaf is None else leaf * 2, tree)
    assert doubled["b"][1] == (4, None) and doubled["a"] == 6
    assert of_torch.tree_paths(tree) == ["['b'][0]", "['b'][1][0]", "['b'][1][1]", "['a']"]


def test_a_tree_is_put_together_from_its_written_structure() -> None:
    leaves, structure = of_torch.tree_flatten({"b": [1, (2, None)], "a": 3})
    again = of_torch.structure_from_text(of_torch.structure_text(structure))
    assert again == structure != of_torch.tree_flatten([1, 2, None, 3])[1]
    assert of_torch.tree_unflatten(leaves, again) == {"b": [1, (2, None)], "a": 3}


def test_a_stream_does_not_see_that_a_loader_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils import worker

    monkeypatch.setattr(worker, "_worker_info", "a loader")
    assert worker.get_worker_info() is not None
    with of_torch.without_worker_info():
        assert worker.get_worker_info() is None
    assert worker.get_worker_info() is not None


# both


def test_nothing_private_of_ray_or_torch_is_imported_elsewhere() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in ("platform", "strategies", "actors", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("ray_compat.py", "torch_compat.py")
        for word in ("ray._", "ray.experimental", "_internal_kv", "torch._", "torch.utils._")
        if any(word in line and "torch.__" not in line for line in path.read_text().splitlines())
    ]
    assert not wrong


def test_operations_that_draw_are_seen() -> None:
    seen: list[str] = []
    with of_torch.RandomOpWatch(lambda: seen.append("drawn")):
        torch.ones(3) + 1
        assert seen == []
        torch.rand(2)
        nn.functional.dropout(torch.ones(2), 0.5, training=True)
        torch.randperm(3)
    torch.rand(2)
    assert len(seen) == 3


def test_what_was_compiled_is_counted_and_hooks_are_left_out() -> None:
    ask = """import torch
from distplat.strategies.torch_compat import frames_compiled, not_compiled
before = frames_compiled()
compiled = torch.compile(lambda one: one + 1, backend="eager")
assert compiled(torch.ones(1)).item() == 2.0
assert frames_compiled() == before + 1
made = []

def backend(graph, inputs):
    made.append(graph.code)
    return graph.forward

def deeper(grad):
    grad.erfinv()

for mark, seen in ((lambda call: call, True), (not_compiled, False)):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.register_post_accumulate_grad_hook(mark(lambda one: deeper(one.grad)))
    step = torch.compile(lambda x: (parameter * x).sum().backward(), backend=backend)
    step(torch.tensor(0.5))
    assert any("erfinv" in one for one in made) == seen, made
    made.clear()
    torch._dynamo.reset()"""
    assert_runs(ask)


def test_what_cannot_be_compiled_runs_in_every_thread() -> None:
    """The thread that prepares a model need not be the one that trains it."""
    ask = """import threading, torch
from distplat.strategies.torch_compat import fall_back_to_eager

def broken(graph, inputs):
    raise RuntimeError("no compiler here")

fall_back_to_eager()
compiled = torch.compile(lambda one: one + 1, backend=broken)
results = []
other = threading.Thread(target=lambda: results.append(compiled(torch.ones(1))), daemon=True)
other.start()
other.join(60)
assert [one.item() for one in results] == [2.0]"""
    assert_runs(ask)
