"""What a cluster gets of the user's folder: no secrets, no home, nothing that would hang Ray."""

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


def nothing(folder: Path) -> list[Any]:
    return []


def names(folder: Path) -> set[str]:
    found = package_module._shipped(folder, EXCLUDES, nothing, [])
    return {str(path.relative_to(folder)) for path, _ in found}


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
def test_a_known_secret_is_not_shipped(secret: str, folder: Path) -> None:
    path = folder / secret
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("key")
    assert names(folder) == {"lin.py"}


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
def test_what_only_sounds_like_a_secret_is_shipped(name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1")
    assert names(folder) == {"lin.py", name}


def test_our_own_package_has_no_name_of_a_secret() -> None:
    ours = Path(shipping.__file__).parent.parent
    files = {
        p for part in ("cli", "actors", "platform", "strategies") for p in (ours / part).rglob("*")
    }
    left_out = {p.name for p in files if p.suffix == ".py"} - {Path(n).name for n in names(ours)}
    assert left_out == set()


def test_ray_leaves_out_the_same(folder: Path) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    secrets = (".env.local", "a/.aws/credentials", "a/kaggle.json", "a/b/lin.pem", "a/ID_RSA")
    for name in (*secrets, "a/keys.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    taken: set[str] = set()
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, list(EXCLUDES))],
        lambda path: taken.add(str(path.relative_to(folder))) if path.is_file() else None,
        include_gitignore=True,
    )
    assert taken == names(folder) == {"lin.py", "a/keys.py"}


def test_what_is_shipped_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "weights").mkdir()
    (folder / "weights/w.bin").write_bytes(bytes(3_000_000))
    package = measure(folder, EXCLUDES, nothing)
    assert str(package) == f"shipping 2 files, 3 MB, of {folder}; the largest: weights 3 MB"
    SubmitRequest(JobSource(folder / "job.yaml")).shipping(None, package)
    SubmitRequest(JobSource(folder / "job.yaml"), quiet=True).shipping(None, package)
    assert capsys.readouterr().err == f"{package}\n"


def test_what_stays_for_its_name_is_said_too(folder: Path) -> None:
    """Data may have such a name, and its task would miss it on the cluster."""
    for name in ("token.json", "a/.env", "a/b/kaggle.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "runs").mkdir()  # it has no such name, and stays unsaid
    said = str(measure(folder, EXCLUDES, nothing))
    stays = "; not shipped, for they may hold keys: a/.env, a/b/kaggle.json, token.json"
    assert said.endswith(stays)
    for number in range(5):
        (folder / f"{number}.pem").write_text("x")
    assert str(measure(folder, EXCLUDES, nothing)).endswith("3.pem, 4.pem, ...")


@pytest.mark.parametrize(
    ("lines", "shipped", "kept"),
    [
        (["!.env", "!a/token.json"], {".env", "a/token.json"}, {"a/kaggle.json", "b/token.json"}),
        (["!token.json", "token.json"], set(), {".env", "a/kaggle.json", "*/token.json"}),
        (["token.json", "!token.json"], {"*/token.json"}, {".env", "a/kaggle.json"}),
        (["!.env", "/lin.py", "a/"], {".env"}, {"a/*.json", "b/token.json"}),
        (["!/*/*.json", "#!.env"], {"a/kaggle.json", "*/token.json"}, {".env"}),
        ([".*"], set(), set()),
    ],
)
def test_what_the_user_takes_back_is_counted_as_ray_ships_it(
    lines: list[str], shipped: set[str], kept: set[str], folder: Path
) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    for name in (".env", "a/token.json", "a/kaggle.json", "b/token.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    excludes, taken = [*EXCLUDES, *lines], set[Path]()
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, excludes)],
        lambda path: taken.add(path) if path.is_file() else None,
        include_gitignore=True,
    )
    package = measure(folder, excludes, nothing)
    everywhere = set() if {"/lin.py", ".*"} & {*lines} else {folder / "lin.py"}
    assert package.paths == taken
    assert taken - everywhere == {path for name in shipped for path in folder.glob(name)}
    assert {*package.secrets} == {path for name in kept for path in folder.glob(name)}


def test_an_ignore_file_may_leave_out_its_own_folder(folder: Path) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    (folder / "a").mkdir()
    (folder / "a/b.py").write_text("x")
    (folder / "a/.gitignore").write_text(".*\n")  # the folder itself is `.` to Ray
    taken = set[Path]()
    packaging._dir_travel(
        folder, [], lambda path: taken.add(path) if path.is_file() else None, True
    )
    assert measure(folder, EXCLUDES, join.ignores).paths == taken == {folder / "lin.py"}


def test_excludes_that_ray_cannot_read_are_named(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^--runtime-env\.excludes: Ray cannot read them"):
        measure(folder, [*EXCLUDES, "!"], nothing)
    (folder / ".rayignore").write_text("!\n")
    with pytest.raises(SpecError, match=r"^--working-dir: Ray cannot read .gitignore or .rayignor"):
        measure(folder, EXCLUDES, join.ignores)


@pytest.mark.parametrize("kind", ["", "RSA ", "OPENSSH ", "ENCRYPTED "])
def test_a_private_key_under_another_name_is_refused(kind: str, folder: Path) -> None:
    text = "subject=CN = me\n-----BEGIN {}PRIVATE KEY-----\nMIIE\n"
    (folder / "deploy").write_text(text.format(kind))
    assert f"{folder / 'deploy'} holds a private key" in refusal(folder)


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
def test_a_private_key_within_a_file_is_refused(name: str, text: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode())
    assert f"{folder / name} holds a private key" in refusal(folder)


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
def test_words_about_keys_are_shipped(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    assert names(folder) == {"lin.py", name}


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_to_a_secret_is_refused(
    inside: bool, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = folder if inside else tmp_path_factory.mktemp("home")
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text("key")
    (folder / "cloud").symlink_to(home / ".aws")
    assert f"cloud leads to {home / '.aws'}, which may hold a key" in refusal(folder)
    (folder / "cloud").unlink()
    (folder / "settings").symlink_to(home / ".aws/config")
    assert "settings leads to " in refusal(folder)


@pytest.mark.parametrize("above", [".envs", "token", "id_rsa_test"])
def test_a_link_below_a_name_that_only_files_have_is_followed(
    above: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("x") / above / "data"
    target.mkdir(parents=True)
    (target / "a").write_text("x")
    (folder / "data").symlink_to(target)
    assert names(folder) == {"lin.py", "data/a"}
    (target / ".env").write_text("x")
    (folder / "settings").symlink_to(target / ".env")
    assert "settings leads to " in refusal(folder)


def test_a_folder_below_one_with_a_secrets_name_may_have_links(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "job"
    (folder / "data").mkdir(parents=True)
    (folder / "data/a").write_text("x")
    (folder / "again").symlink_to("data")
    assert names(folder) == {"data/a", "again/a"}


def test_an_empty_folder_is_shipped(tmp_path: Path) -> None:
    assert str(measure(tmp_path, EXCLUDES, nothing)) == f"shipping 0 files, 0 B, of {tmp_path}"


def test_a_home_directory_is_shipped_only_if_it_was_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    package = measure(folder, EXCLUDES, nothing)
    with pytest.raises(
        SpecError, match=r"--working-dir: .* would be shipped to the cluster as a whole"
    ):
        SubmitRequest(JobSource(folder / "job.yaml")).shipping(None, package)
    SubmitRequest(JobSource(folder / "job.yaml", working_dir=folder)).shipping(None, package)
    (folder / "job").mkdir()
    refuse_home(measure(folder / "job", EXCLUDES, nothing), "why")
    for above in (Path("/"), folder.parent):
        package = Package(above, 1, 1, "", frozenset({folder / "lin.py"}))
        with pytest.raises(SpecError, match=f"--working-dir: .*{above}.* would be .*, for why"):
            refuse_home(package, "why")


def test_a_home_within_the_folder_may_stay_there_if_nothing_of_it_is_shipped(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers and sandboxes have such: HOME=/workspace/project/.home."""
    home, job = folder / ".home", tmp_path_factory.mktemp("job")
    monkeypatch.setenv("HOME", str(home))
    (home / ".config").mkdir(parents=True)
    (home / ".config/settings").write_text("x")
    refuse_home(measure(folder, EXCLUDES, nothing), "why")
    assert measured(job, folder).modules[0].files == 1
    (home / ".cache").mkdir()
    (home / ".cache/a").write_text("x")
    with pytest.raises(SpecError, match=r"files of the home directory .*/\.home would be .*why"):
        refuse_home(measure(folder, EXCLUDES, nothing), "why")
    with pytest.raises(SpecError, match=r"py_modules: .* holds files of the home directory"):
        measured(job, folder)
    (folder / ".rayignore").write_text(".home/\n")
    refuse_home(measure(folder, EXCLUDES, join.ignores), "why")
    user = {"py_modules": [str(folder)]}
    package = measure_environment(with_folders(job, user), join.ignores, MAX_PACKAGE)
    assert package.modules[0].files == 2


def measured(folder: Path, *modules: Path | str, limit: int = MAX_PACKAGE) -> Package:
    user = {"py_modules": [str(module) for module in modules]}
    return measure_environment(with_folders(folder, user), nothing, limit)


def test_modules_beside_the_folder_are_counted_and_said(tmp_path: Path) -> None:
    folder, lib, one = tmp_path / "job", tmp_path / "lib", tmp_path / "one.py"
    for path in (folder / "lin.py", lib / "a.py", lib / ".env", one):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    package = measured(folder, lib, one, "s3://bucket/far.zip", "gone")
    assert [(module.folder, module.files) for module in package.modules] == [(lib, 1), (one, 1)]
    assert str(package) == (
        f"shipping 1 file, 1 B, of {folder}; the largest: lin.py 1 B"
        f"; and 1 file, 1 B, of {lib}; the largest: a.py 1 B"
        f"; not shipped, for they may hold keys: .env; and 1 file, 1 B, of {one}"
    )


@pytest.mark.parametrize(
    ("module", "why"),
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
def test_modules_are_looked_into_as_the_folder_is(
    module: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(SpecError, match=rf"^--runtime-env\.py_modules: .*{why}"):
        measured(folder, tmp_path / module)


def hollow(path: Path, size: int) -> Path:
    """Make a file that has a size and takes no room."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


def test_each_module_may_be_as_large_as_the_folder(tmp_path: Path) -> None:
    """By the job API; a wheel is uploaded as it is, a folder is packed."""
    job, wheel = tmp_path / "job", hollow(tmp_path / "a-1-py3-none-any.whl", 101 * 2**20)
    hollow(job / "a", 60 * 2**20)
    hollow(tmp_path / "lib/a", 60 * 2**20)
    assert measured(job, tmp_path / "lib").modules[0].size == 60 * 2**20
    told = r"py_modules: .*whl has 101 MiB; the limit of an upload is 100 MiB"
    with pytest.raises(SpecError, match=told):
        measured(job, wheel)
    hollow(tmp_path / "lib/b", 41 * 2**20)
    with pytest.raises(
        SpecError, match=r"py_modules: .*lib has 101 MiB; the limit of an upload is 100 MiB"
    ):
        measured(job, tmp_path / "lib")


def test_a_driver_ships_what_ray_takes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    for name in ("check_listening", "_check_ray", "_join"):
        monkeypatch.setattr(join, name, lambda *args: None)
    job, wheel = tmp_path / "job", hollow(tmp_path / "a.whl", 300 * 2**20)
    hollow(job / "a", 300 * 2**20)
    environment, told = with_folders(job, {"py_modules": [str(wheel)]}), list[Package]()
    with join.connected("127.0.0.1:1", environment, told.append):
        assert [one.size for one in (told[0], *told[0].modules)] == [300 * 2**20] * 2
    hollow(wheel, packaging.GCS_STORAGE_MAX_SIZE)
    with pytest.raises(
        SpecError, match=r"py_modules: .*a\.whl has 512 MiB; the limit of an upload is 512"
    ):
        with join.connected("127.0.0.1:1", environment, told.append):
            pass


def test_the_limit_of_a_job_api_is_rays() -> None:
    constants = pytest.importorskip("ray._private.ray_constants")
    assert constants.DASHBOARD_CLIENT_MAX_SIZE == MAX_PACKAGE


@pytest.mark.parametrize("name", [".gitignore", ".rayignore"])
def test_an_ignore_file_that_is_no_text_is_named(name: str, folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / name).write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError) as raised:
        measure(folder, EXCLUDES, join.ignores)
    told = f"--working-dir: Ray cannot read .gitignore or .rayignore of {folder / 'below'}: 'utf-8'"
    assert str(raised.value).startswith(told)


def refusal(folder: Path) -> str:
    with pytest.raises(SpecError) as raised:
        measure(folder, EXCLUDES, nothing)
    text = str(raised.value)
    assert text.startswith("--working-dir: ") and ".rayignore" in text
    return text


def test_links_that_lead_back_are_refused(folder: Path) -> None:
    (folder / "one").symlink_to(".")
    (folder / "two").symlink_to(".")
    assert "leads back to a folder that it is in" in refusal(folder)


def test_a_link_to_another_folder_is_followed(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/a").write_text("x")
    (folder / "again").symlink_to("data")
    (folder / "nowhere").symlink_to("gone")
    assert names(folder) == {"lin.py", "data/a", "again/a"}


def test_links_that_fan_out_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "MAX_ENTRIES", 1000)
    for number in range(30):
        (folder / f"d{number}").mkdir()
        for link in "ab":
            (folder / f"d{number}" / link).symlink_to(f"../d{number + 1}")
    assert "holds more than 1000 files and folders" in refusal(folder)


def test_a_pipe_in_the_folder_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert f"{folder / 'pipe'} is a pipe" in refusal(folder)


def test_a_folder_that_may_not_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "db").mkdir()
    entries = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "db":
            raise PermissionError(13, "Permission denied")
        return entries(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert f"{folder / 'db'} cannot be read: Permission denied" in refusal(folder)


def test_a_file_that_may_not_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lin.py")
    assert f"{folder / 'lin.py'} may not be read" in refusal(folder)


def test_what_vanishes_meanwhile_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*entries(path), path / "gone"])
    assert names(folder) == {"lin.py"}
