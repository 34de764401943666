"""Redacts secrets from job fields that a report page or a tracker shows to others."""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
_SECRET_NAME = re.compile(
    r"(?i)(password|passwd|passphrase|secret|credentials?|(auth|access|api|hub|hf)_?token"
    r"|(api|access|private|secret|account|signing|encryption|auth|wandb|hf|openai|aws)_?key(_?id)?"
    r"|(^|_)pwd|^token)$"
)
"""Names of fields with secrets. `pad_token` and `max_tokens` are not secret."""
_SECRET_VALUE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bxox[a-z]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|://[^/@\s:]*:[^/@\s]+@"
)
"""Known formats of keys, and URLs with a password, under any field name."""


def redact(value: Any) -> Any:
    """Return a job's fields with `***` in place of likely secrets, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _is_secret(str(key), item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return REDACTED if isinstance(value, str) and _SECRET_VALUE.search(value) else value


def _is_secret(key: str, value: object) -> bool:
    """Return whether a key's name indicates a secret; empty values are not secret."""
    return value not in (None, "") and bool(_SECRET_NAME.search(key.replace("-", "_")))
