"""
What a `storage_path` or `--resume` may name beside a directory: a URL that fsspec reads.

Of such a run the local directory stays what it is, below `runs`; a copy of it is kept at the URL
while the run goes on (`run_upload.py`).
"""

import re
from importlib.util import find_spec

LOCAL = "runs"
"""Where the run directories of a `storage_path` that is a URL are made."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Which of our extras brings the library of a scheme."""


def is_url(text: str) -> bool:
    """Say whether a path is a URL."""
    return _URL.match(text) is not None


def local_folder(storage_path: str) -> str:
    """Give the folder of the local run directories."""
    return LOCAL if is_url(storage_path) else storage_path


def url_problem(url: str) -> tuple[str, str]:
    """
    Say why a URL is refused, and what to do; empty: it is not. The texts hold no part of it.

    Secrets in a URL would come into `job.yaml`, logs and messages.
    """
    match = _URL.match(url)
    assert match is not None, "is_url was asked"
    scheme, rest = match[1].lower(), url[match.end() :]
    if "@" in rest.partition("/")[0]:
        hint = "leave it out: the library of the scheme reads its environment and files"
        return "a URL must hold no user or password", hint
    if any(sign in rest for sign in ("?", "#", "::", "://")):
        return "a URL must hold no query, fragment or second URL", "write scheme://bucket/prefix"
    if scheme in ("http", "https"):
        hint = "for a server that speaks S3 write s3://bucket/prefix and set AWS_ENDPOINT_URL"
        return f"{scheme}:// cannot be written to", hint
    if ".." in rest.split("/") or not rest.strip("/"):
        return "a URL must name a bucket or directory, without `..`", "write scheme://bucket/prefix"
    if scheme in ("file", "local") and not rest.startswith("/"):
        return f"{scheme}:// needs an absolute path", f"write {scheme}:///home/me/runs"
    return "", ""


def missing_library(url: str) -> tuple[str, str]:
    """Say which library of a URL's scheme is not installed, and how to get it; empty: none."""
    from fsspec.registry import known_implementations, registry

    scheme = url.partition("://")[0]
    if scheme in registry:
        return "", ""
    if scheme not in known_implementations:
        return f"fsspec knows no {scheme}://", "for example s3://, gs:// or file://"
    about = known_implementations[scheme]
    module = str(about["class"]).partition(".")[0]
    if find_spec(module) is not None:
        return "", ""
    extra = _EXTRAS.get(scheme)
    hint = f"pip install 'distplat[{extra}]'" if extra else str(about.get("err", ""))
    return f"{scheme}:// needs the package {module}, which is not installed", hint
