"""`redact` replaces secrets, recognized by key or value, and keeps similar entries."""

import pytest

from distplat.platform.redaction import REDACTED, redact


@pytest.mark.parametrize(
    "key",
    [
        *("password", "db_password", "DB_PASSWD", "secret", "client-secret", "token", "hf_token"),
        *("hub_token", "access_token", "authToken", "api_key", "apiKey", "OPENAI_API_KEY"),
        *("aws_secret_access_key", "awsSecretAccessKey", "AWS_ACCESS_KEY_ID", "wandb_key"),
        *("private_key", "credentials", "passphrase", "pwd"),
    ],
)
def test_secret_is_recognized_by_key(key: str) -> None:
    assert redact({"task_args": {key: "canary"}}) == {"task_args": {key: REDACTED}}
    assert redact({key: {"a": "canary"}}) == {key: REDACTED}


@pytest.mark.parametrize(
    "value",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "hf_" + "a" * 34,
        "ghp_" + "a" * 36,
        "sk-proj-" + "a" * 40,
        "-----BEGIN RSA PRIVATE KEY-----\nMII",
        "postgres://user:canary@host/db",
        "redis://:canary@host",
    ],
)
def test_secret_is_recognized_by_value(value: str) -> None:
    assert redact({"where": [value, {"x": value}]}) == {"where": [REDACTED, {"x": REDACTED}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("pad_token", "<pad>"),
            ("eos_token", "</s>"),
            ("max_tokens", 512),
            ("tokenizer", "gpt2"),
        ),
        *(
            ("sort_key", "id"),
            ("key", "label"),
            ("keys", ["a"]),
            ("secret", None),
            ("password", ""),
        ),
        *(("data", "s3://bucket/a:b@c"), ("url", "http://h:80/a@b"), ("mask", "hf_mask-rest")),
    ],
)
def test_similar_keys_are_kept(key: str, value: object) -> None:
    assert redact({key: value}) == {key: value}
