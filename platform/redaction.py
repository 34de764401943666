"""What looks like a secret is not shown: a page of a run, or a tracker's, is handed on."""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
_NAMED = re.compile(
    r"(?i)(password|passwd|passphrase|secret|credentials?|(auth|access|api|hub|hf)_?token"
    r"|(api|access|private|secret|account|signing|encryption|auth|wandb|hf|openai|aws)_?key(_?id)?"
    r"|(^|_)pwd|^token)$"
)
"""Keys of values that are secrets. `pad_token` and `max_tokens` are not."""
_KNOWN = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bxox[a-z]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|://[^/@\s:]*:[^/@\s]+@"
)
"""Keys by their form, and URLs with a password, whatever they are called."""


def redact(value: Any) -> Any:
    """Give a job's fields with `***` for what looks like a secret, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _is_secret(str(key), item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return REDACTED if isinstance(value, str) and _KNOWN.search(value) else value


def _is_secret(key: str, value: object) -> bool:
    """Say whether a key's name tells of a secret; nothing at all is none."""
    return value not in (None, "") and bool(_NAMED.search(key.replace("-", "_")))
