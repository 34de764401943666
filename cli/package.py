"""
The package of a folder that is uploaded to a cluster: its size, without files that may hold keys.

Ray packs folders itself, following .gitignore and .rayignore. This module computes the package in
advance, because Ray's job API rejects more than 100 MiB only after the upload, with an HTTP error.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NoReturn

from typing_extensions import override

from distplat.cli.figures import size_text
from distplat.platform.errors import Problem, SpecError

_SECRET_FOLDERS = (
    *(".ssh", ".gnupg", ".aws", ".azure", ".gcloud", ".config", ".kube", ".docker", ".kaggle"),
    *(".huggingface", ".pip", ".oci"),
)
SECRETS = (
    *(".env*", "*.env", "*.env~", "*.env.bak", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks"),
    *("*.kdbx", "*.ppk", "*.keystore", "*.ovpn*", "wg[0-9].conf", "*.keytab", "krb5cc_*"),
    *("*.p8", "*.gpg", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", *_SECRET_FOLDERS),
    *(".dockercfg*", ".databrickscfg*", "*.tfstate*", ".terraformrc*", "*.tfvars*"),
    *("kubeconfig", "kubeconfig~", "kubeconfig.bak", "kubeconfig.y*ml", "kubeconfig.y*ml[.~]*"),
    *("kube?config.y*ml", "kube?config.y*ml[.~]*"),
    *("*.kubeconfig*", ".netrc*", "_netrc*", ".pgpass*", ".my.cnf*", ".pypirc*"),
    *("pip.conf*", ".condarc*", ".npmrc*", ".git-credentials*", ".htpasswd*", ".boto*"),
    *(".s3cfg*", ".vault-token*", ".vault_pass*", "token", "token~", "auth_token"),
    *("credentials.json", "credentials.json[.~]*", "*[-_]credentials.json"),
    *("*[-_]credentials.json[.~]*", "client_secret*.json", "client_secret*.json[.~]*"),
    *("service?account*.json", "service?account*.json[.~]*", "credentials.csv*"),
    *("credentials.toml*", "rootkey.csv*", "*accesskeys*.csv*", "kaggle.json*"),
    *("application_default_credentials.json*", "secret.json", "secret.toml", "secret.y*ml"),
    *("secret.y*ml[.~]*", "*[-_]secret.y*ml", "*[-_]secret.y*ml[.~]*", ".secrets*"),
    *("secrets.json", "secrets.toml", "secrets.y*ml", "secrets.y*ml[.~]*"),
    *("*[-_]secrets.y*ml", "*[-_]secrets.y*ml[.~]*", ".token", "token.json", "token.txt"),
    *("hf_token", ".hf_token*", "hf_token.txt", "*api?key.txt", "*apikey.txt", "cookies.txt"),
    *(".*_history", ".rhistory", ".passwd*", "rclone.conf*", ".yarnrc.yml*", ".modal.toml*"),
)
"""Names of files with keys and passwords, which all users of a cluster could read."""
HARMLESS = (
    *("*[-._]example", "*[-._]sample", "*[-._]template", "*.tmpl", "*.tpl", "*.j2", "*.dist"),
    *("*.md", "*.rst", "*.html", ".secrets.baseline", ".environment"),
)
"""Exceptions from `SECRETS`: names of templates and documentation."""


def _case_insensitive(pattern: str) -> str:
    """Return a case-insensitive pattern, since Ray's ignore patterns are case-sensitive."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in pattern)


_SECRETS = tuple(map(_case_insensitive, SECRETS))
_HARMLESS = tuple(map(_case_insensitive, HARMLESS))
EXCLUDES = (
    *(".git", ".venv", "venv", "__pycache__", "runs", ".ray", *_SECRETS),
    *(f"!{name}" for name in _HARMLESS),
)
"""Excluded names, as lines of a .gitignore: the last matching line decides."""
MAX_PACKAGE = 100 * 2**20
"""Maximum bytes of a folder or module at a job API; a driver (`--address HOST:6379`) has more."""
MAX_ENTRIES = 200_000
"""Maximum number of files and folders in a package; Ray would take minutes to pack more."""
_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"
    rb"|^PuTTY-User-Key-File-\d"
    # Within a line, or indented, the header may be quoted text: there key data must follow.
    rb"|-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----(?:\\[nr]|\s)+[A-Za-z0-9+/]{40}",
    re.MULTILINE,
)
_KEY_BYTES = 2**16
"""Maximum size of a file that is searched for a private key; key files are smaller."""
_SHOWN = 5
"""Maximum number of withheld names in a message."""
Ignores = Callable[[Path], list[Callable[[Path], bool]]]
"""Returns, for a folder, the tests of its ignore files."""


@dataclass(frozen=True)
class Package:
    """The files of a folder that are uploaded to a cluster."""

    folder: Path
    files: int
    size: int
    """Bytes, uncompressed."""
    largest: str
    """Name and size of the largest file or folder in the package."""
    paths: frozenset[Path] = frozenset()
    """Paths of the files."""
    secrets: tuple[Path, ...] = ()
    """Files and folders that are not uploaded, since their names are those of secrets."""

    modules: "tuple[Package, ...]" = ()
    """Packages of the user's `py_modules`."""

    @override
    def __str__(self) -> str:
        """`shipping 12 files, 3.2 MB, of /home/me/job; the largest: weights.bin 3 MB`."""
        return f"shipping {'; and '.join(map(Package._facts, (self, *self.modules)))}"

    def _facts(self) -> str:
        count = "1 file" if self.files == 1 else f"{self.files} files"
        details = f"; the largest: {self.largest}" if self.largest else ""
        if self.secrets:
            names = [str(path.relative_to(self.folder)) for path in self.secrets[:_SHOWN]]
            more = ", ..." if len(self.secrets) > _SHOWN else ""
            details += f"; not shipped, for they may hold keys: {', '.join(names)}{more}"
        return f"{count}, {size_text(self.size)}, of {self.folder}{details}"


def refuse_home(package: Package, reason: str) -> None:
    """
    Refuse to upload a home directory, or files of it, without an explicit `--working-dir`.

    Args:
        package: package to check.
        reason: why this folder was selected, for the message.

    Raises:
        SpecError: the package is a home directory or contains files of one.
    """
    message, hint = "", "name the folder with --working-dir"
    if _is_home(package.folder):
        message = f"{package.folder} would be shipped to the cluster as a whole, for {reason}"
        hint = f"move the job to a folder of its own, or {hint}"
    elif _has_home(package):
        message = f"files of the home directory {_home()} would be shipped to the cluster"
        message += f" with {package.folder}, for {reason}"
        hint = f"list it in .rayignore, move the job to a folder of its own, or {hint}"
    if message:
        raise SpecError(Problem(("--working-dir",), message, hint))


def _home() -> Path:
    return Path(os.path.expanduser("~")).resolve()


def _is_home(folder: Path) -> bool:
    resolved = folder.resolve()
    return resolved in (_home(), Path(resolved.anchor))


def _has_home(package: Package) -> bool:
    """Return whether the package contains files of the user's home directory."""
    resolved, home = package.folder.resolve(), _home()
    if not home.is_relative_to(resolved):
        return False
    home_in_package = package.folder / home.relative_to(resolved)
    return any(path.is_relative_to(home_in_package) for path in package.paths)


def measure_environment(environment: Mapping[str, Any], ignores: Ignores, limit: int) -> Package:
    """
    Compute the package of a runtime environment: the working directory and the `py_modules`.

    Args:
        environment: result of `shipping.with_folders`: the first module is distplat itself.
        ignores: see `Ignores`.
        limit: maximum bytes of the folder, and of each module.

    Raises:
        SpecError: see `measure`; or a module is a home directory.
    """
    excludes = environment["excludes"]
    package = measure(Path(environment["working_dir"]), excludes, ignores, limit)
    paths = [Path(name) for name in environment["py_modules"][1:] if "://" not in name]
    try:
        modules = [_module(path, excludes, ignores, limit) for path in paths if path.exists()]
    except SpecError as error:
        where = ("--runtime-env", "py_modules")
        raise SpecError(*(replace(problem, where=where) for problem in error.problems)) from None
    return replace(package, modules=tuple(modules))


def _module(path: Path, excludes: Sequence[str], ignores: Ignores, limit: int) -> Package:
    """Compute the package of an entry of `py_modules`: a directory, or a file."""
    if _is_home(path):
        _refuse(path, "is a home directory")
    if _is_secret(path.resolve().name):
        _refuse(path, "may hold a key")
    _refuse_secret(path, path.parent)
    if path.is_dir():
        package = measure(path, excludes, ignores, limit)
        if _has_home(package):
            _refuse(path, f"holds files of the home directory {_home()}")
        return package
    if not path.is_file():
        _refuse(path, "is a pipe, a socket or a device, and no file")
    _check_size(path, path.stat().st_size, limit, "give a URL that the cluster can read")
    return Package(path, 1, path.stat().st_size, "")


def measure(
    working_dir: Path, excludes: Sequence[str], ignores: Ignores, limit: int = MAX_PACKAGE
) -> Package:
    """
    Compute the package of a folder.

    Raises:
        SpecError: the package is larger than `limit` (the error names the five largest entries);
            or an entry cannot be read, is a pipe or a device, is a link to a parent folder, or
            holds a private key. The cluster would reject such a package, or Ray would hang.
    """
    sizes: dict[Path, int] = {}
    files: set[Path] = set()
    secrets: list[Path] = []
    for path, size in _shipped(working_dir, excludes, ignores, secrets):
        top = working_dir / path.relative_to(working_dir).parts[0]
        sizes[top] = sizes.get(top, 0) + size
        files.add(path)
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    shown = ", ".join(f"{path.name} {size / 2**20:.0f} MiB" for path, size in largest)
    hint = f"list what the job does not need in .rayignore there; the largest: {shown}"
    _check_size(working_dir, total, limit, hint)
    largest_text = f"{largest[0][0].name} {size_text(largest[0][1])}" if largest else ""
    paths = frozenset(files)
    return Package(working_dir, len(files), total, largest_text, paths, tuple(sorted(secrets)))


def _check_size(path: Path, size: int, limit: int, hint: str) -> None:
    if size > limit:
        most = f"{limit / 2**20:.0f} MiB"
        message = f"{path} has {size / 2**20:.0f} MiB; the limit of an upload is {most}"
        raise SpecError(Problem(("--working-dir",), message, hint))


@dataclass(frozen=True)
class _Folder:
    """A folder of the directory walk."""

    path: Path
    tests: tuple[Callable[[Path], bool], ...]
    """Tests of the ignore files of all parent folders."""
    ancestors: frozenset[tuple[int, int]]
    """Device and inode of all parent folders, to detect loops."""


def _shipped(
    working_dir: Path, excludes: Sequence[str], ignores: Ignores, secrets: list[Path]
) -> Iterator[tuple[Path, int]]:
    """
    Walk a folder as Ray does: follow links, and apply ignore files to all folders below them.

    Args:
        working_dir: root of the walk.
        excludes: excluded paths, as lines of a .gitignore in the root.
        ignores: see `Ignores`.
        secrets: output list for paths with the name of a secret.

    Yields:
        Each file and its size in bytes.
    """
    excluded = _exclude_test(working_dir, excludes)
    waiting = [] if excluded(working_dir) else [_Folder(working_dir, (), frozenset())]
    entries = 0
    while waiting:
        folder, paths = waiting.pop(), list[Path]()
        with _reading(folder.path):
            folder, paths = _entered(folder, ignores)
        entries += len(paths)
        if entries > MAX_ENTRIES:
            _refuse(working_dir, f"holds more than {MAX_ENTRIES} files and folders")
        for path in paths:
            if any(test(path) for test in folder.tests):
                continue
            if excluded(path):
                if _is_secret(path.name):
                    secrets.append(path)
                continue
            with _reading(path):
                _refuse_secret(path, working_dir)
                stat = path.stat()
                if S_ISDIR(stat.st_mode):
                    waiting.append(replace(folder, path=path))
                else:
                    _refuse_unreadable(path, stat.st_mode)
                    yield path, stat.st_size


def _entered(folder: _Folder, ignores: Ignores) -> tuple[_Folder, list[Path]]:
    """Return the folder with its own ignore files and inode added, and its entries."""
    stat = folder.path.stat()
    inode = stat.st_dev, stat.st_ino
    if inode in folder.ancestors:
        _refuse(folder.path, "leads back to a folder that it is in")
    tests = (*folder.tests, *ignores(folder.path))
    folder = _Folder(folder.path, tests, folder.ancestors | {inode})
    is_ignored = any(test(folder.path) for test in folder.tests)  # `.*` matches Ray's name `.`
    return folder, [] if is_ignored else list(folder.path.iterdir())


def _exclude_test(working_dir: Path, excludes: Sequence[str]) -> Callable[[Path], bool]:
    """
    Return Ray's test for `excludes`: the last matching line decides.

    Raises:
        SpecError: Ray cannot parse the lines.
    """
    from distplat.actors import ray_compat  # imports Ray, which an upload needs anyway

    try:
        excluded = ray_compat.exclude_test(working_dir, list(excludes))
    except (ValueError, IndexError) as error:
        text = f"Ray cannot read them, as lines of a .gitignore: {error}"
        raise SpecError(Problem(("--runtime-env", "excludes"), text)) from None
    has_user_lines = set(excludes) > set(EXCLUDES)
    # Ray's test takes half a millisecond, which names without a match in EXCLUDES can skip.
    return lambda path: (has_user_lines or in_excludes(path.name)) and excluded(path)


def _refuse_unreadable(path: Path, mode: int) -> None:
    if not S_ISREG(mode):
        _refuse(path, "is a pipe, a socket or a device, and no file")
    if not os.access(path, os.R_OK):
        _refuse(path, "may not be read")


def _refuse_secret(path: Path, working_dir: Path) -> None:
    """
    Refuse a key under a harmless name: a link to a secret, or a file with a private key.

    Raises:
        SpecError: the path is such a link or file.
    """
    stat = path.stat()
    if path.is_symlink():
        target, top = path.resolve(), working_dir.resolve()
        parts = (target.relative_to(top) if target.is_relative_to(top) else target).parts
        secret_folders = _name_pattern(tuple(map(_case_insensitive, _SECRET_FOLDERS)))
        if _is_secret(target.name) or any(map(secret_folders.match, parts[:-1])):
            _refuse(path, f"leads to {target}, which may hold a key")
    if S_ISREG(stat.st_mode) and stat.st_size <= _KEY_BYTES and os.access(path, os.R_OK):
        if _PRIVATE_KEY.search(path.read_bytes()):
            _refuse(path, "holds a private key, which all users of the cluster could read")


def in_excludes(name: str) -> bool:
    """Return whether any line of `EXCLUDES` matches a name; a later line may negate the match."""
    return _name_pattern(EXCLUDES).match(name) is not None


def _is_secret(name: str) -> bool:
    secret, harmless = _name_pattern(_SECRETS).match(name), _name_pattern(_HARMLESS).match(name)
    return secret is not None and harmless is None


@cache
def _name_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(name.rstrip("/")) for name in patterns) or r"\Z.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """
    Ignore files that were deleted during the walk, and broken links.

    Raises:
        SpecError: the path cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")


def _refuse(path: Path, reason: str) -> NoReturn:
    hint = "list it in .rayignore, or ship another folder"
    raise SpecError(Problem(("--working-dir",), f"{path} {reason}", hint))
