"""
What a cluster gets of a folder: measured, without what may hold a key.

Ray packs folders itself, following .gitignore and .rayignore; here is counted first what it will
pack, for its job API refuses more than 100 MiB only after the upload, with a bare HTTP error.
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
"""Names that are known to hold keys and passwords: all users of a cluster could read them."""
HARMLESS = (
    *("*[-._]example", "*[-._]sample", "*[-._]template", "*.tmpl", "*.tpl", "*.j2", "*.dist"),
    *("*.md", "*.rst", "*.html", ".secrets.baseline", ".environment"),
)
"""Of these names those that only tell what a secret looks like."""


def _case_insensitive(pattern: str) -> str:
    """Give a pattern that takes `ID_RSA` for `id_rsa`: Ray tells the two apart."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in pattern)


_SECRETS = tuple(map(_case_insensitive, SECRETS))
_HARMLESS = tuple(map(_case_insensitive, HARMLESS))
EXCLUDES = (
    *(".git", ".venv", "venv", "__pycache__", "runs", ".ray", *_SECRETS),
    *(f"!{name}" for name in _HARMLESS),
)
"""As lines of a .gitignore: the last one that matches counts."""
MAX_PACKAGE = 100 * 2**20
"""Bytes of a folder or a module that a job API takes; a driver (`--address HOST:6379`) has more."""
MAX_ENTRIES = 200_000
"""Files and folders that are looked at; Ray would pack more for minutes."""
_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"
    rb"|^PuTTY-User-Key-File-\d"
    # Within a line, or indented, it may be a word about keys: there a part of the key must follow.
    rb"|-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----(?:\\[nr]|\s)+[A-Za-z0-9+/]{40}",
    re.MULTILINE,
)
_KEY_BYTES = 2**16
"""No file with a private key is larger, and most files are."""
_SHOWN = 5
"""Names of what is left out that are told."""
Ignores = Callable[[Path], list[Callable[[Path], bool]]]
"""Gives, for a folder, the tests that its ignore files ask for."""


@dataclass(frozen=True)
class Package:
    """What a cluster gets of a folder."""

    folder: Path
    files: int
    size: int
    """Bytes, before Ray packs them."""
    largest: str
    """Name and size of the largest file or folder in it."""
    paths: frozenset[Path] = frozenset()
    """The files."""
    kept_back: tuple[Path, ...] = ()
    """Files and folders that stay, for their names are those of secrets."""

    modules: "tuple[Package, ...]" = ()
    """What goes beside it: the user's `py_modules`."""

    def __str__(self) -> str:
        """`shipping 12 files, 3.2 MB, of /home/me/job; the largest: weights.bin 3 MB`."""
        return f"shipping {'; and '.join(map(Package._facts, (self, *self.modules)))}"

    def _facts(self) -> str:
        count = "1 file" if self.files == 1 else f"{self.files} files"
        details = f"; the largest: {self.largest}" if self.largest else ""
        if self.kept_back:
            names = [str(path.relative_to(self.folder)) for path in self.kept_back[:_SHOWN]]
            more = ", ..." if len(self.kept_back) > _SHOWN else ""
            details += f"; not shipped, for they may hold keys: {', '.join(names)}{more}"
        return f"{count}, {size_text(self.size)}, of {self.folder}{details}"


def refuse_home(package: Package, why: str) -> None:
    """
    Refuse to ship a home directory, or files of it, which nobody has named.

    Args:
        package: would be shipped.
        why: for the message.

    Raises:
        SpecError: it is or has such.
    """
    message, hint = "", "name the folder with --working-dir"
    if _is_home(package.folder):
        message = f"{package.folder} would be shipped to the cluster as a whole, for {why}"
        hint = f"move the job to a folder of its own, or {hint}"
    elif _has_home(package):
        message = f"files of the home directory {_home()} would be shipped to the cluster"
        message += f" with {package.folder}, for {why}"
        hint = f"list it in .rayignore, move the job to a folder of its own, or {hint}"
    if message:
        raise SpecError(Problem(("--working-dir",), message, hint))


def _home() -> Path:
    return Path(os.path.expanduser("~")).resolve()


def _is_home(folder: Path) -> bool:
    whole = folder.resolve()
    return whole in (_home(), Path(whole.anchor))


def _has_home(package: Package) -> bool:
    """Say whether files of a home directory within the folder are shipped with it."""
    whole, home = package.folder.resolve(), _home()
    if not home.is_relative_to(whole):
        return False
    inside = package.folder / home.relative_to(whole)
    return any(path.is_relative_to(inside) for path in package.paths)


def measure_environment(environment: Mapping[str, Any], ignores: Ignores, limit: int) -> Package:
    """
    See what a cluster gets of this machine: the folder, and beside it the `py_modules`.

    Args:
        environment: `shipping.with_folders` gave it: the first module is distplat itself.
        ignores: see `Ignores`.
        limit: bytes that a cluster takes of the folder, and of each module.

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
        raise SpecError(*(replace(one, where=where) for one in error.problems)) from None
    return replace(package, modules=tuple(modules))


def _module(path: Path, excludes: Sequence[str], ignores: Ignores, limit: int) -> Package:
    """Measure one of `py_modules`: a directory, or a file."""
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
    _check_size(path, path.stat().st_size, limit, "name it by a URL that the cluster can read")
    return Package(path, 1, path.stat().st_size, "")


def measure(
    working_dir: Path, excludes: Sequence[str], ignores: Ignores, limit: int = MAX_PACKAGE
) -> Package:
    """
    See what a cluster gets of a folder; refuse what it would refuse, or what would hang Ray.

    Raises:
        SpecError: more than `limit` bytes, and names the five largest things in it; or a part of
            it cannot be read, is a pipe or a device, leads back into itself, or holds a private
            key.
    """
    sizes: dict[Path, int] = {}
    files: set[Path] = set()
    kept_back: list[Path] = []
    for path, size in _shipped(working_dir, excludes, ignores, kept_back):
        top = working_dir / path.relative_to(working_dir).parts[0]
        sizes[top] = sizes.get(top, 0) + size
        files.add(path)
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    shown = ", ".join(f"{path.name} {size / 2**20:.0f} MiB" for path, size in largest)
    hint = f"list what the job does not need in .rayignore there; the largest: {shown}"
    _check_size(working_dir, total, limit, hint)
    largest_text = f"{largest[0][0].name} {size_text(largest[0][1])}" if largest else ""
    secrets = tuple(sorted(kept_back))
    return Package(working_dir, len(files), total, largest_text, frozenset(files), secrets)


def _check_size(path: Path, size: int, limit: int, hint: str) -> None:
    if size > limit:
        most = f"{limit / 2**20:.0f} MiB"
        message = f"{path} has {size / 2**20:.0f} MiB; a cluster takes {most} this way"
        raise SpecError(Problem(("--working-dir",), message, hint))


@dataclass(frozen=True)
class _Folder:
    """A folder on the walk."""

    path: Path
    tests: tuple[Callable[[Path], bool], ...]
    """What the ignore files of the folders above leave out."""
    above: frozenset[tuple[int, int]]
    """Device and inode of the folders around it: one that comes again is a loop."""


def _shipped(
    working_dir: Path, excludes: Sequence[str], ignores: Ignores, kept_back: list[Path]
) -> Iterator[tuple[Path, int]]:
    """
    Walk as Ray does: links are followed, ignore files count for all below them.

    Args:
        working_dir: where it begins.
        excludes: what is passed over, as lines of a .gitignore there.
        ignores: see `Ignores`.
        kept_back: takes what has the name of a secret.

    Yields:
        Each file and its bytes.
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
                kept_back += [path] * _is_secret(path.name)
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
    """Add a folder's own ignore files, and itself to those around; give what lies in it, too."""
    stat = folder.path.stat()
    if (stat.st_dev, stat.st_ino) in folder.above:
        _refuse(folder.path, "leads back to a folder that it is in")
    above = folder.above | {(stat.st_dev, stat.st_ino)}
    folder = _Folder(folder.path, (*folder.tests, *ignores(folder.path)), above)
    left_out = any(test(folder.path) for test in folder.tests)  # by `.*`: Ray calls it `.`
    return folder, [] if left_out else list(folder.path.iterdir())


def _exclude_test(working_dir: Path, excludes: Sequence[str]) -> Callable[[Path], bool]:
    """
    Give the test of what Ray leaves out for its `excludes`: the last line that matches counts.

    Raises:
        SpecError: Ray cannot read them.
    """
    from distplat.actors import ray_compat  # imports Ray, which who ships has imported anyway

    try:
        excluded = ray_compat.exclude_test(working_dir, list(excludes))
    except (ValueError, IndexError) as error:
        text = f"Ray cannot read them, as lines of a .gitignore: {error}"
        raise SpecError(Problem(("--runtime-env", "excludes"), text)) from None
    own_lines = set(excludes) > set(EXCLUDES)
    # Ray's test takes half a millisecond. A name that no line of ours matches needs none.
    return lambda path: (own_lines or in_excludes(path.name)) and excluded(path)


def _refuse_unreadable(path: Path, mode: int) -> None:
    if not S_ISREG(mode):
        _refuse(path, "is a pipe, a socket or a device, and no file")
    if not os.access(path, os.R_OK):
        _refuse(path, "may not be read")


def _refuse_secret(path: Path, working_dir: Path) -> None:
    """
    Refuse a key under a name that does not tell: a link to one, or a file that holds one.

    Raises:
        SpecError: it is one.
    """
    stat = path.stat()
    if path.is_symlink():
        target, top = path.resolve(), working_dir.resolve()
        parts = (target.relative_to(top) if target.is_relative_to(top) else target).parts
        above = _name_pattern(tuple(map(_case_insensitive, _SECRET_FOLDERS)))
        if _is_secret(target.name) or any(map(above.match, parts[:-1])):
            _refuse(path, f"leads to {target}, which may hold a key")
    if S_ISREG(stat.st_mode) and stat.st_size <= _KEY_BYTES and os.access(path, os.R_OK):
        if _PRIVATE_KEY.search(path.read_bytes()):
            _refuse(path, "holds a private key, which all users of the cluster could read")


def in_excludes(name: str) -> bool:
    """Say whether a line of `EXCLUDES` matches a name; a later one may take it back."""
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
    Pass over what has gone meanwhile, and links to nothing.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")


def _refuse(path: Path, why: str) -> NoReturn:
    hint = "list it in .rayignore, or ship another folder"
    raise SpecError(Problem(("--working-dir",), f"{path} {why}", hint))
