"""Upload of the user's folder: secrets, home directories and files that would hang Ray."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distplat.cli import join, shipping
from distplat.cli import package as package_module
from distplat.cli.package import (
    EXCLUDES,
    MAX_PACKAGE,
    Package,
    measure,
    measure_environment,
    refuse_home,
)
from distplat.cli.shipping import with_folders
from distplat.cli.submit import JobSource, SubmitRequest
from distplat.platform.errors import SpecError


def no_ignores(folder: Path) -> list[Any]:
    return []


def shipped_names(folder: Path) -> set[str]:
    entries = package_module._shipped(folder, EXCLUDES, no_ignores, [])
    return {str(path.relative_to(folder)) for path, _ in entries}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "lin.py").write_text("x = 1\n")
    yield tmp_path


@pytest.mark.parametrize(
    "secret",
    [
        ".env",
        ".env.local",
        ".env.production",
        ".netrc",
        "id_rsa",
        "id_ed25519",
        "id_ed25519.pub",
        "server.pem",
        "server.key",
        "wallet.p12",
        "kaggle.json",
        "credentials.json",
        "client_secret_1.apps.json",
        "service-account.json",
        "service_account_prod.json",
        "secrets.toml",
        "deep/er/.aws/credentials",
        ".ssh/config",
        ".kube/config",
        ".docker/config.json",
        ".pypirc",
        ".git-credentials",
        "prod.env",
        "ID_RSA",
        "KEY.PEM",
        "deep/Credentials.JSON",
        "my.keystore",
        ".dockercfg",
        ".databrickscfg",
        "terraform.tfstate",
        ".bash_history",
        ".config/gcloud/access_tokens.db",
        ".cache/huggingface/token",
        "gcp-credentials.json",
        "team_accessKeys.csv",
        "token.json",
        "openai_api_key.txt",
        "me.keytab",
        ".secrets.toml",
        "prod.tfvars",
        ".env-prod",
        ".env~",
        "prod.env.bak",
        ".netrc.bak",
        ".pypirc~",
        "terraform.tfstate.backup",
        "kubeconfig.yaml",
        "secret.yaml",
        "db-secret.yml",
        "credentials.json.old",
        "client.ovpn",
        "db_secret.yml.orig",
        "secret.yaml~",
        ".env.prod",
        ".envs/production",
        "terraform.tfvars.json",
    ],
)
def test_known_secret_is_not_shipped(secret: str, folder: Path) -> None:
    path = folder / secret
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("key")
    assert shipped_names(folder) == {"lin.py"}


@pytest.mark.parametrize(
    "name",
    [
        "environment.py",
        "env/gym.py",
        "keys.py",
        "secrets.py",
        "token.py",
        "tokens.json",
        "config/model.json",
        "history.csv",
        "credentials/__init__.py",
        "tokenizer.json",
        "api_keys.py",
        "accesskeys.py",
        "kubeconfig.py",
        "environment.yml",
        "envs/pole.py",
        "base.env.yaml",
        "token.jsonl",
        "secret_santa.yaml",
        ".env.example",
        ".env.local.sample",
        ".env_template",
        "terraform.tfvars.example",
        ".secrets.baseline",
        ".environment",
        "my_secret.yaml.md",
        "credentials.jsonl",
        "kubeconfig.yaml.j2",
    ],
)
def test_name_similar_to_secret_is_shipped(name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1")
    assert shipped_names(folder) == {"lin.py", name}


def test_own_package_has_no_secret_names() -> None:
    package = Path(shipping.__file__).parent.parent
    files = {
        p
        for part in ("cli", "actors", "platform", "strategies")
        for p in (package / part).rglob("*")
    }
    left_out = {p.name for p in files if p.suffix == ".py"} - {
        Path(n).name for n in shipped_names(package)
    }
    assert left_out == set()


def test_ray_excludes_the_same_files(folder: Path) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    secrets = (".env.local", "a/.aws/credentials", "a/kaggle.json", "a/b/lin.pem", "a/ID_RSA")
    for name in (*secrets, "a/keys.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    shipped_by_ray: set[str] = set()
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, list(EXCLUDES))],
        lambda path: shipped_by_ray.add(str(path.relative_to(folder))) if path.is_file() else None,
        include_gitignore=True,
    )
    assert shipped_by_ray == shipped_names(folder) == {"lin.py", "a/keys.py"}


def test_prints_summary_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "weights").mkdir()
    (folder / "weights/w.bin").write_bytes(bytes(3_000_000))
    package = measure(folder, EXCLUDES, no_ignores)
    assert str(package) == f"shipping 2 files, 3 MB, of {folder}; the largest: weights 3 MB"
    SubmitRequest(JobSource(folder / "job.yaml")).shipping(None, package)
    SubmitRequest(JobSource(folder / "job.yaml"), quiet=True).shipping(None, package)
    assert capsys.readouterr().err == f"{package}\n"


def test_summary_lists_withheld_files(folder: Path) -> None:
    """Data may have such a name, and the task would miss it on the cluster."""
    for name in ("token.json", "a/.env", "a/b/kaggle.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "runs").mkdir()  # excluded, but not listed
    text = str(measure(folder, EXCLUDES, no_ignores))
    excluded = "; not shipped, for they may hold keys: a/.env, a/b/kaggle.json, token.json"
    assert text.endswith(excluded)
    for number in range(5):
        (folder / f"{number}.pem").write_text("x")
    assert str(measure(folder, EXCLUDES, no_ignores)).endswith("3.pem, 4.pem, ...")


@pytest.mark.parametrize(
    ("lines", "shipped", "withheld"),
    [
        (["!.env", "!a/token.json"], {".env", "a/token.json"}, {"a/kaggle.json", "b/token.json"}),
        (["!token.json", "token.json"], set(), {".env", "a/kaggle.json", "*/token.json"}),
        (["token.json", "!token.json"], {"*/token.json"}, {".env", "a/kaggle.json"}),
        (["!.env", "/lin.py", "a/"], {".env"}, {"a/*.json", "b/token.json"}),
        (["!/*/*.json", "#!.env"], {"a/kaggle.json", "*/token.json"}, {".env"}),
        ([".*"], set(), set()),
    ],
)
def test_negated_excludes_match_ray(
    lines: list[str], shipped: set[str], withheld: set[str], folder: Path
) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    for name in (".env", "a/token.json", "a/kaggle.json", "b/token.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    excludes, shipped_by_ray = [*EXCLUDES, *lines], set[Path]()
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, excludes)],
        lambda path: shipped_by_ray.add(path) if path.is_file() else None,
        include_gitignore=True,
    )
    package = measure(folder, excludes, no_ignores)
    always_shipped = set() if {"/lin.py", ".*"} & {*lines} else {folder / "lin.py"}
    assert package.paths == shipped_by_ray
    assert shipped_by_ray - always_shipped == {
        path for name in shipped for path in folder.glob(name)
    }
    assert {*package.secrets} == {path for name in withheld for path in folder.glob(name)}


def test_ignore_file_may_exclude_its_own_folder(folder: Path) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    (folder / "a").mkdir()
    (folder / "a/b.py").write_text("x")
    (folder / "a/.gitignore").write_text(".*\n")  # Ray names the folder itself `.`
    shipped_by_ray = set[Path]()
    packaging._dir_travel(
        folder, [], lambda path: shipped_by_ray.add(path) if path.is_file() else None, True
    )
    assert measure(folder, EXCLUDES, join.ignores).paths == shipped_by_ray == {folder / "lin.py"}


def test_reports_excludes_that_ray_cannot_parse(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^--runtime-env\.excludes: Ray cannot read them"):
        measure(folder, [*EXCLUDES, "!"], no_ignores)
    (folder / ".rayignore").write_text("!\n")
    with pytest.raises(SpecError, match=r"^--working-dir: Ray cannot read .gitignore or .rayignor"):
        measure(folder, EXCLUDES, join.ignores)


@pytest.mark.parametrize("key_type", ["", "RSA ", "OPENSSH ", "ENCRYPTED "])
def test_rejects_private_key_under_other_name(key_type: str, folder: Path) -> None:
    text = "subject=CN = me\n-----BEGIN {}PRIVATE KEY-----\nMIIE\n"
    (folder / "deploy").write_text(text.format(key_type))
    assert f"{folder / 'deploy'} holds a private key" in error_of(folder)


BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
HEAD = "-----BEGIN PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("proj-4f3a2b1c9d8e.json", '{"private_key": "' + HEAD + "\\n" + BODY + '\\n"}'),
        ("values.yaml", f"tls:\n  key: |\n    {HEAD}\n    {BODY}\n"),
        ("windows.yaml", f"tls:\r\n  key: |\r\n    {HEAD}\r\n    {BODY}\r\n"),
        ("deploy", "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n"),
    ],
)
def test_rejects_private_key_within_file(name: str, text: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode())
    assert f"{folder / name} holds a private key" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_keys.py", f'KEY = "{HEAD}\\nabc\\n"\n    {HEAD}\n'),
        ("check.py", f'if text.startswith("{HEAD}"):\n    {BODY} = 1\n'),
        ("README.md", f"Begin with `{HEAD}`.\n\n    {HEAD}\n    ...\n"),
        ("public.txt", f"-----BEGIN PUBLIC KEY-----\n{BODY}\n"),
        (
            "config.json",
            json.dumps({"private_key": "path/to/key", "note": "PuTTY-User-Key-File-3"}),
        ),
    ],
)
def test_ships_text_about_keys(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    assert shipped_names(folder) == {"lin.py", name}


@pytest.mark.parametrize("inside", [True, False])
def test_rejects_link_to_secret(
    inside: bool, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = folder if inside else tmp_path_factory.mktemp("home")
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text("key")
    (folder / "cloud").symlink_to(home / ".aws")
    assert f"cloud leads to {home / '.aws'}, which may hold a key" in error_of(folder)
    (folder / "cloud").unlink()
    (folder / "settings").symlink_to(home / ".aws/config")
    assert "settings leads to " in error_of(folder)


@pytest.mark.parametrize("above", [".envs", "token", "id_rsa_test"])
def test_follows_link_below_folder_with_file_like_name(
    above: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("x") / above / "data"
    target.mkdir(parents=True)
    (target / "a").write_text("x")
    (folder / "data").symlink_to(target)
    assert shipped_names(folder) == {"lin.py", "data/a"}
    (target / ".env").write_text("x")
    (folder / "settings").symlink_to(target / ".env")
    assert "settings leads to " in error_of(folder)


def test_follows_links_in_folder_below_secret_name(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "job"
    (folder / "data").mkdir(parents=True)
    (folder / "data/a").write_text("x")
    (folder / "again").symlink_to("data")
    assert shipped_names(folder) == {"data/a", "again/a"}


def test_ships_empty_folder(tmp_path: Path) -> None:
    assert str(measure(tmp_path, EXCLUDES, no_ignores)) == f"shipping 0 files, 0 B, of {tmp_path}"


def test_ships_home_directory_only_if_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    package = measure(folder, EXCLUDES, no_ignores)
    with pytest.raises(
        SpecError, match=r"--working-dir: .* would be shipped to the cluster as a whole"
    ):
        SubmitRequest(JobSource(folder / "job.yaml")).shipping(None, package)
    SubmitRequest(JobSource(folder / "job.yaml", working_dir=folder)).shipping(None, package)
    (folder / "job").mkdir()
    refuse_home(measure(folder / "job", EXCLUDES, no_ignores), "why")
    for above in (Path("/"), folder.parent):
        package = Package(above, 1, 1, "", frozenset({folder / "lin.py"}))
        with pytest.raises(SpecError, match=f"--working-dir: .*{above}.* would be .*, for why"):
            refuse_home(package, "why")


def test_accepts_home_within_folder_if_excluded(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Example of containers: HOME=/workspace/project/.home."""
    home, job = folder / ".home", tmp_path_factory.mktemp("job")
    monkeypatch.setenv("HOME", str(home))
    (home / ".config").mkdir(parents=True)
    (home / ".config/settings").write_text("x")
    refuse_home(measure(folder, EXCLUDES, no_ignores), "why")
    assert measure_modules(job, folder).modules[0].files == 1
    (home / ".cache").mkdir()
    (home / ".cache/a").write_text("x")
    with pytest.raises(SpecError, match=r"files of the home directory .*/\.home would be .*why"):
        refuse_home(measure(folder, EXCLUDES, no_ignores), "why")
    with pytest.raises(SpecError, match=r"py_modules: .* holds files of the home directory"):
        measure_modules(job, folder)
    (folder / ".rayignore").write_text(".home/\n")
    refuse_home(measure(folder, EXCLUDES, join.ignores), "why")
    user = {"py_modules": [str(folder)]}
    package = measure_environment(with_folders(job, user), join.ignores, MAX_PACKAGE)
    assert package.modules[0].files == 2


def measure_modules(folder: Path, *modules: Path | str, limit: int = MAX_PACKAGE) -> Package:
    user = {"py_modules": [str(module) for module in modules]}
    return measure_environment(with_folders(folder, user), no_ignores, limit)


def test_summary_contains_py_modules(tmp_path: Path) -> None:
    folder, lib, module_file = tmp_path / "job", tmp_path / "lib", tmp_path / "one.py"
    for path in (folder / "lin.py", lib / "a.py", lib / ".env", module_file):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    package = measure_modules(folder, lib, module_file, "s3://bucket/far.zip", "gone")
    assert [(module.folder, module.files) for module in package.modules] == [
        (lib, 1),
        (module_file, 1),
    ]
    assert str(package) == (
        f"shipping 1 file, 1 B, of {folder}; the largest: lin.py 1 B"
        f"; and 1 file, 1 B, of {lib}; the largest: a.py 1 B"
        f"; not shipped, for they may hold keys: .env; and 1 file, 1 B, of {module_file}"
    )


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("home", "home is a home directory"),
        ("above", "holds files of the home directory"),
        ("home/.aws", ".aws may hold a key"),
        ("home/cloud", "cloud may hold a key"),
        ("home/linked", "config leads to .*, which may hold a key"),
        ("home/lib", "deploy holds a private key"),
        ("home/key.py", "key.py holds a private key"),
        ("home/pipe.py", "pipe.py is a pipe"),
    ],
)
def test_checks_py_modules_like_the_folder(
    module: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = tmp_path / "home", tmp_path / "job"
    for path in (home / ".aws", home / "lib", home / "linked", folder):
        path.mkdir(parents=True)
    (tmp_path / "above/home").mkdir(parents=True)
    (tmp_path / "above/home/notes").write_text("x")
    (home / ".aws" / "config").write_text("key")
    (home / "cloud").symlink_to(home / ".aws")
    (home / "linked" / "config").symlink_to(home / ".aws" / "config")
    for name in ("lib/deploy", "key.py"):
        (home / name).write_text("-----BEGIN PRIVATE KEY-----\nMIIE\n")
    os.mkfifo(home / "pipe.py")
    monkeypatch.setenv("HOME", str(tmp_path / "above/home" if module == "above" else home))
    with pytest.raises(SpecError, match=rf"^--runtime-env\.py_modules: .*{reason}"):
        measure_modules(folder, tmp_path / module)


def sparse_file(path: Path, size: int) -> Path:
    """Create a sparse file of a size."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


def test_size_limit_applies_to_each_module(tmp_path: Path) -> None:
    """The limit is that of the job API; wheels are uploaded as they are, folders as archives."""
    job, wheel = tmp_path / "job", sparse_file(tmp_path / "a-1-py3-none-any.whl", 101 * 2**20)
    sparse_file(job / "a", 60 * 2**20)
    sparse_file(tmp_path / "lib/a", 60 * 2**20)
    assert measure_modules(job, tmp_path / "lib").modules[0].size == 60 * 2**20
    error = r"py_modules: .*whl has 101 MiB; the limit of an upload is 100 MiB"
    with pytest.raises(SpecError, match=error):
        measure_modules(job, wheel)
    sparse_file(tmp_path / "lib/b", 41 * 2**20)
    with pytest.raises(
        SpecError, match=r"py_modules: .*lib has 101 MiB; the limit of an upload is 100 MiB"
    ):
        measure_modules(job, tmp_path / "lib")


def test_driver_has_size_limit_of_gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    for name in ("check_listening", "_check_ray", "_join"):
        monkeypatch.setattr(join, name, lambda *args: None)
    job, wheel = tmp_path / "job", sparse_file(tmp_path / "a.whl", 300 * 2**20)
    sparse_file(job / "a", 300 * 2**20)
    environment, packages = with_folders(job, {"py_modules": [str(wheel)]}), list[Package]()
    with join.connected("127.0.0.1:1", environment, packages.append):
        assert [part.size for part in (packages[0], *packages[0].modules)] == [300 * 2**20] * 2
    sparse_file(wheel, packaging.GCS_STORAGE_MAX_SIZE)
    with pytest.raises(
        SpecError, match=r"py_modules: .*a\.whl has 512 MiB; the limit of an upload is 512"
    ):
        with join.connected("127.0.0.1:1", environment, packages.append):
            pass


def test_size_limit_of_job_api_is_that_of_ray() -> None:
    constants = pytest.importorskip("ray._private.ray_constants")
    assert constants.DASHBOARD_CLIENT_MAX_SIZE == MAX_PACKAGE


@pytest.mark.parametrize("name", [".gitignore", ".rayignore"])
def test_reports_ignore_file_that_is_not_text(name: str, folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / name).write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError) as raised:
        measure(folder, EXCLUDES, join.ignores)
    error = (
        f"--working-dir: Ray cannot read .gitignore or .rayignore of {folder / 'below'}: 'utf-8'"
    )
    assert str(raised.value).startswith(error)


def error_of(folder: Path) -> str:
    with pytest.raises(SpecError) as raised:
        measure(folder, EXCLUDES, no_ignores)
    text = str(raised.value)
    assert text.startswith("--working-dir: ") and ".rayignore" in text
    return text


def test_rejects_cyclic_links(folder: Path) -> None:
    (folder / "one").symlink_to(".")
    (folder / "two").symlink_to(".")
    assert "leads back to a folder that it is in" in error_of(folder)


def test_follows_link_to_other_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/a").write_text("x")
    (folder / "again").symlink_to("data")
    (folder / "nowhere").symlink_to("gone")
    assert shipped_names(folder) == {"lin.py", "data/a", "again/a"}


def test_rejects_links_with_exponential_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "MAX_ENTRIES", 1000)
    for number in range(30):
        (folder / f"d{number}").mkdir()
        for link in "ab":
            (folder / f"d{number}" / link).symlink_to(f"../d{number + 1}")
    assert "holds more than 1000 files and folders" in error_of(folder)


def test_rejects_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert f"{folder / 'pipe'} is a pipe" in error_of(folder)


def test_rejects_unreadable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "db").mkdir()
    entries = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "db":
            raise PermissionError(13, "Permission denied")
        return entries(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert f"{folder / 'db'} cannot be read: Permission denied" in error_of(folder)


def test_rejects_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lin.py")
    assert f"{folder / 'lin.py'} may not be read" in error_of(folder)


def test_ignores_files_that_vanish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*entries(path), path / "gone"])
    assert shipped_names(folder) == {"lin.py"}
