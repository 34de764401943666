"""The private APIs of Ray and torch that distplat uses exist and work as expected."""

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
    """Replaces the client of Ray's key-value store."""

    def internal_kv_put(
        self, key: bytes, value: bytes, overwrite: bool, namespace: object = None
    ) -> bool:
        if overwrite or key not in self:
            self[key] = value
        return True

    def internal_kv_get(self, key: bytes, namespace: object = None) -> bytes | None:
        return self.get(key)

    def internal_kv_keys(self, prefix: bytes, namespace: object = None) -> list[bytes]:
        return [key for key in self if key.startswith(prefix)]

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: object = None) -> int:
        deleted = [name for name in self if name == key or (by_prefix and name.startswith(key))]
        for name in deleted:
            del self[name]
        return len(deleted)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(internal_kv, "global_gcs_client", store)
    monkeypatch.setattr(internal_kv, "_initialized", True)
    return store


def test_put_first_keeps_the_first_value(store: Store) -> None:
    of_ray.put_first(b"a/1", b"one")
    of_ray.put_first(b"a/1", b"two")
    assert of_ray.get(b"a/1") == b"one"
    assert of_ray.get(b"b") is None


def test_store_lists_overwrites_and_deletes(store: Store) -> None:
    store |= {b"a": b"", b"a/1": b""}
    of_ray.put(b"a/1", b"one")
    of_ray.put(b"a/1", b"two")
    assert of_ray.get(b"a/1") == b"two"
    assert of_ray.keys(b"a/") == [b"a/1"]
    of_ray.delete(b"a/1")
    assert [*store] == [b"a"]


def test_delete_all_deletes_by_prefix(store: Store) -> None:
    for key in (b"a/1", b"a/2", b"b"):
        of_ray.put_first(key, b"x")
    of_ray.delete_all(b"a/")
    assert store == {b"b": b"x"}


def test_free_resources_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        def available_resources_per_node(self) -> dict[str, dict[str, float]]:
            return {"node": {"CPU": 2.0}}

    monkeypatch.setattr(ray._private.state, "state", State())
    assert of_ray.free_resources() == {"node": {"CPU": 2.0}}


def test_ray_is_ours_if_this_process_started_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not of_ray.ray_is_ours()
    head = type("Node", (), {"head": True})()
    monkeypatch.setattr(ray._private.worker, "_global_node", head)
    assert of_ray.ray_is_ours()
    assert "self.head = " in inspect.getsource(ray._private.node.Node)


def test_log_folder_is_that_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_ray.log_folder() is None
    node = SimpleNamespace(get_logs_dir_path=lambda: Path("/there/logs"))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    assert of_ray.log_folder() == "/there/logs"
    assert callable(ray._private.node.Node.get_logs_dir_path)


def test_own_ray_uses_the_loopback_address() -> None:
    from ray._private import services

    with of_ray.loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.ray_constants.ENABLE_RAY_CLUSTER


def test_own_signals_keeps_signal_handlers() -> None:
    """Ray's handler calls `sys.exit`, so SIGTERM would look like an exit of the user's code."""
    for module in (ray._private.worker, ray._private.node):
        assert "ray._private.utils.set_sigterm_handler(" in inspect.getsource(module)
    before = signal.getsignal(signal.SIGTERM)
    with of_ray.own_signals():
        ray._private.utils.set_sigterm_handler(lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
    ray._private.utils.set_sigterm_handler(before)
    assert signal.getsignal(signal.SIGTERM) is before


def test_temporary_folder_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not start if the path is too long for a socket."""
    with TemporaryDirectory(prefix="t") as short:
        monkeypatch.chdir(short)
        longest = f"{short}/{'x' * (of_ray.FOLDER_BYTES - len(short) - 1)}"
        for base, parent in ((longest, longest), ("new", f"{short}/new"), (f"{longest}x", "/tmp")):
            monkeypatch.setenv("RAY_TMPDIR", base)
            ray_folder = RayFolder(of_ray.temporary_folder())
            folder = ray_folder.path.parent
            assert (folder.parent, folder.stat().st_mode & 0o777) == (Path(parent), 0o700)
            ray_folder.remove()
            assert not folder.exists()


def test_ray_writes_its_address_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    ray._private.utils.write_ray_address("10.0.0.1:6379", None)
    assert of_ray.address_file() == tmp_path / "ray/ray_current_cluster"
    assert of_ray.address_file().read_text() == "10.0.0.1:6379"


def test_address_of_auto_reads_the_file_or_finds_a_process(
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


@pytest.mark.parametrize("uid", [0, os.getuid(), os.getuid() + 1])
def test_addresses_here_searches_processes_of_the_user_and_root(
    uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["/lib/ray/raylet", "--gcs-address=10.0.0.3:6379", "--more"]
    infos = [
        {"cmdline": line, "uids": SimpleNamespace(real=uid, effective=0)},
        {"cmdline": ["python", *line[1:]], "uids": SimpleNamespace(real=0)},
        {"cmdline": None, "uids": None},  # ended, or access denied
    ]
    processes = [SimpleNamespace(info=info) for info in infos]
    monkeypatch.setattr(psutil, "process_iter", lambda fields: iter(processes))
    assert of_ray.addresses_here() == ({"10.0.0.3:6379"} if uid in (0, os.getuid()) else set())


def test_addresses_here_reads_the_command_line_of_raylet(tmp_path: Path) -> None:
    line = ["raylet", "-c", "print(flush=True); input()", "--gcs-address=127.0.0.1:1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, executable=sys.executable, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.read(1)
        assert "127.0.0.1:1" in of_ray.addresses_here()
        process.stdin.close()
    assert "--gcs-address={" in inspect.getsource(ray._private.services)


def test_standalone_gcs_client_exists() -> None:
    """`test_jobs.py` covers its errors: an unreachable head takes seconds."""
    doc = inspect.getdoc(ray._raylet.InnerGcsClient.standalone)
    signature = (
        "standalone(unicode gcs_address: str, cluster_id: Optional[str], int timeout_ms: int)"
    )
    assert doc is not None and signature in doc


def test_ignore_tests_read_rayignore(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text("*.bin\n")
    tests = of_ray.ignore_tests(tmp_path, logging.getLogger("test"))
    assert any(test(tmp_path / "a.bin") for test in tests)
    assert not any(test(tmp_path / "a.py") for test in tests)


@pytest.mark.parametrize(("variable", "is_ignored"), [(None, True), ("0", True), ("1", False)])
def test_ignore_tests_read_gitignore_unless_the_variable_is_set(
    variable: str | None, is_ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, raising=False)
    if variable is not None:
        monkeypatch.setenv(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, variable)
    (tmp_path / ".gitignore").write_text("*.bin\n")
    tests = of_ray.ignore_tests(tmp_path, logging.getLogger("test"))
    assert any(test(tmp_path / "a.bin") for test in tests) is is_ignored


def test_job_config_has_the_driver_path() -> None:
    config = of_ray.job_config("/home/user", one_machine=False)
    assert "/home/user" in config._py_driver_sys_path
    assert b"/home/user" in config._get_proto_job_config().SerializeToString()


@pytest.mark.parametrize("one_machine", [True, False])
def test_job_config_says_whether_a_run_stays_on_one_machine(
    one_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_jobs.py` shows that actors receive it in `Worker.core_worker`."""
    config = of_ray.job_config("/home/user", one_machine=one_machine)._get_proto_job_config()
    core = SimpleNamespace(get_job_config=lambda: config)
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace(core_worker=core))
    assert of_ray.stays_on_machine() is one_machine


def test_ray_client_driver_does_not_stay_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace())
    assert not of_ray.stays_on_machine()


def test_ray_reads_the_job_config_variable() -> None:
    assert of_ray.JOB_CONFIG_VARIABLE == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    source = inspect.getsource(ray._private.worker)
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in source


def test_with_requests_wraps_every_request_of_the_job_client(
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


def test_prefix_of_uploaded_packages() -> None:
    from ray._private.runtime_env import packaging

    assert packaging.RAY_PKG_PREFIX == SHIPPED


def test_names_of_the_upload_loggers() -> None:
    import ray.dashboard.modules.dashboard_sdk as sdk
    from ray._private.runtime_env import packaging

    for module in (sdk, packaging):
        assert any(module.__name__.startswith(name) for name in of_ray.LOGGERS)


# torch


@pytest.mark.parametrize("name", sorted(set(REGISTRIES)))
def test_modules_have_hook_registries(name: str) -> None:
    assert name in vars(nn.Linear(1, 1))


def test_tensor_hooks_finds_hooks() -> None:
    tensor = torch.zeros(1, requires_grad=True)
    assert module_hooks.tensor_hooks(tensor) == []
    tensor.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    tensor.register_post_accumulate_grad_hook(len)  # type: ignore[no-untyped-call]
    assert module_hooks.tensor_hooks(tensor) == ["a hook", "a post-accumulate hook"]


def test_tensor_version_counts_writes() -> None:
    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


@pytest.mark.parametrize(
    "cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d]
)
def test_has_running_statistics(cls: Any) -> None:
    assert of_torch.has_running_statistics(cls(2))
    assert not of_torch.has_running_statistics(nn.LayerNorm(2))


def test_check_input_rejects_wrong_shape() -> None:
    of_torch.check_input(nn.SyncBatchNorm(2), torch.zeros(3, 2))
    with pytest.raises(ValueError):
        of_torch.check_input(nn.SyncBatchNorm(2), torch.zeros(3))


def test_has_global_hooks() -> None:
    assert not of_torch.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert of_torch.has_global_hooks()
    finally:
        handle.remove()


def test_collate_with_rules() -> None:
    rules = {**of_torch.COLLATE_RULES, str: lambda samples, **_: "".join(samples)}
    batch = of_torch.collate_with_rules(
        rules, [{"x": torch.ones(1), "t": "a"}, {"x": torch.ones(1), "t": "b"}]
    )
    assert batch["t"] == "ab" and batch["x"].shape == (2, 1)


def assert_runs(code: str) -> None:
    """Run code in a new process, so that this process does not load the compiler."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert process.returncode == 0, process.stderr


def test_neither_a_module_nor_an_optimizer_imports_the_compiler() -> None:
    code = """import sys, torch
from distplat.strategies.torch_compat import avoid_compiler_import, compiled_module
assert compiled_module(torch.nn.Linear(1, 1)) is None
assert "torch._dynamo" not in sys.modules
avoid_compiler_import()
torch.optim.SGD([torch.zeros(1)], lr=0.1)
assert "torch._dynamo" not in sys.modules"""
    assert_runs(code)


def test_call_compiled_uses_the_given_compiler() -> None:
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


def test_after_backward_runs_at_the_end_and_propagates_errors() -> None:
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]
    has_grad: list[list[bool]] = []

    def queue(_: Tensor) -> None:
        of_torch.after_backward(lambda: has_grad.append([w.grad is not None for w in weights]))

    hook = weights[0].register_post_accumulate_grad_hook(queue)  # type: ignore[no-untyped-call]
    torch.autograd.backward(weights[0] * weights[1])
    assert has_grad == [[True, True]]

    def fail() -> None:
        raise KeyError("at the end")

    hook.remove()
    weights[0].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _: of_torch.after_backward(fail)
    )
    with pytest.raises(KeyError, match="at the end"):
        torch.autograd.backward(weights[0] * weights[1])


def test_tree_functions_keep_the_order() -> None:
    tree = {"b": [torch.ones(1), (2, None)], "a": 3}
    leaves = of_torch.tree_leaves(tree)
    assert [leaf if not isinstance(leaf, Tensor) else "t" for leaf in leaves] == ["t", 2, None, 3]
    doubled = of_torch.tree_map(lambda leaf: leaf if leaf is None else leaf * 2, tree)
    assert doubled["b"][1] == (4, None) and doubled["a"] == 6
    assert of_torch.tree_paths(tree) == ["['b'][0]", "['b'][1][0]", "['b'][1][1]", "['a']"]


def test_tree_structure_round_trips_as_text() -> None:
    leaves, structure = of_torch.tree_flatten({"b": [1, (2, None)], "a": 3})
    parsed = of_torch.structure_from_text(of_torch.structure_text(structure))
    assert parsed == structure != of_torch.tree_flatten([1, 2, None, 3])[1]
    assert of_torch.tree_unflatten(leaves, parsed) == {"b": [1, (2, None)], "a": 3}


def test_without_worker_info_hides_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils import worker

    monkeypatch.setattr(worker, "_worker_info", "a loader")
    assert worker.get_worker_info() is not None
    with of_torch.without_worker_info():
        assert worker.get_worker_info() is None
    assert worker.get_worker_info() is not None


# both


def test_private_apis_are_used_only_in_compat_modules() -> None:
    violations = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in ("platform", "strategies", "actors", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("ray_compat.py", "torch_compat.py")
        for word in ("ray._", "ray.experimental", "_internal_kv", "torch._", "torch.utils._")
        if any(word in line and "torch.__" not in line for line in path.read_text().splitlines())
    ]
    assert not violations


def test_random_op_watch_sees_random_operations() -> None:
    events: list[str] = []
    with of_torch.RandomOpWatch(lambda: events.append("drawn")):
        torch.ones(3) + 1
        assert events == []
        torch.rand(2)
        nn.functional.dropout(torch.ones(2), 0.5, training=True)
        torch.randperm(3)
    torch.rand(2)
    assert len(events) == 3


COUNTS_FRAMES = """import torch
from distplat.strategies.torch_compat import frames_compiled, not_compiled
before = frames_compiled()
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(1)).item() == 2.0
assert frames_compiled() == before + 1
graphs = []

def backend(graph, inputs):
    graphs.append(graph.code)
    return graph.forward

def compute(grad):
    grad.erfinv()

for wrap, is_compiled in ((lambda call: call, True), (not_compiled, False)):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.register_post_accumulate_grad_hook(wrap(lambda p: compute(p.grad)))
    step = torch.compile(lambda x: (parameter * x).sum().backward(), backend=backend)
    step(torch.tensor(0.5))
    assert any("erfinv" in text for text in graphs) == is_compiled, graphs
    graphs.clear()
    torch._dynamo.reset()
"""
FALLS_BACK = """import threading, torch
from distplat.strategies.torch_compat import fall_back_to_eager

def broken(graph, inputs):
    raise RuntimeError("no compiler here")

fall_back_to_eager()
compiled = torch.compile(lambda x: x + 1, backend=broken)
results = []
other = threading.Thread(target=lambda: results.append(compiled(torch.ones(1))), daemon=True)
other.start()
other.join(60)
assert [result.item() for result in results] == [2.0]
"""


def test_counts_compiled_frames_and_falls_back_to_eager_in_every_thread() -> None:
    """
    Hooks are excluded; a model may be prepared in one thread and trained in another.

    One process runs both parts, because the import of the compiler takes seconds.
    """
    assert_runs(COUNTS_FRAMES + FALLS_BACK)
