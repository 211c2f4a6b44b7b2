"""nemotron.redaction: what is a secret, and what must never be taken for one."""

from __future__ import annotations

import pytest

from nemotron.redaction import (
    HIDDEN,
    is_secret_name,
    looks_like_secret,
    redact_argv,
    redact_data,
    redact_text,
    secret_values,
)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "db_password",
        "apiKey",
        "--hf-token",
        "client_secret",
        "passphrase",
        "SLACK_TOKEN",
        "token",
        "credentials",
    ],
)
def test_is_secret_name_knows_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "tokenization",
        "max_doc_tokens",
        "pad_token",
        "eos_token_id",
        "tokenizer_blake3",
        "keys",
        "key",
        "secrets",
        "num_query_groups",
        "monkey",
        "TOKENIZERS_PARALLELISM",
        "author",
    ],
)
def test_is_secret_name_never_takes_a_tokenizer_for_a_secret(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "a" * 34,
        "nvapi-" + "b" * 40,
        "ghp_" + "C" * 36,
        "github_pat_" + "d" * 30,
        "sk-proj-" + "A1b2" * 8,
        "AKIA" + "ABCDEFGHIJ123456",
        "-----BEGIN RSA PRIVATE KEY-----",
        "https://user:pass@host/x",
        "https://ghtoken@host/x",
    ],
)
def test_looks_like_secret_knows_common_credentials(value: str) -> None:
    assert looks_like_secret(value)


@pytest.mark.parametrize(
    "value",
    [
        "hf_model",
        "sk-learn-tuned-adapter-for-the-demo",
        "ssh://git@github.com/a/b",
        "https://host/x?y=z@w",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
        "./output/peft/megatron_bridge/tiny",
    ],
)
def test_looks_like_secret_leaves_ordinary_values_alone(value: str) -> None:
    assert not looks_like_secret(value)


def test_forty_hex_digits_are_a_secret_only_under_a_key() -> None:
    digits = "0123456789" * 4
    assert looks_like_secret(digits, "WANDB_API_KEY")
    assert looks_like_secret(digits, "wandb_key")
    assert not looks_like_secret(digits, "git_sha")


def test_secret_values_takes_named_and_secret_variables_and_no_short_words() -> None:
    environ = {"HF_TOKEN": "hunter22", "MY_LOGIN": "letmein1", "HOME": "/root", "API_KEY": "none"}
    assert secret_values(environ, ["MY_LOGIN"]) == {"hunter22", "letmein1"}


def test_redact_text_hides_known_values_and_shapes() -> None:
    text = "with hunter22 and https://u:p@h/x"
    assert redact_text(text, ["hunter22"]) == f"with {HIDDEN} and https://{HIDDEN}@h/x"


def test_redact_argv_hides_both_spellings_of_an_option() -> None:
    argv = ["run", "--api-key", "abc", "--hf-token=def", "wandb.api_key=ghi", "tokenizer=bpe", "k"]
    assert redact_argv(argv) == [
        "run",
        "--api-key",
        HIDDEN,
        f"--hf-token={HIDDEN}",
        f"wandb.api_key={HIDDEN}",
        "tokenizer=bpe",
        "k",
    ]


def test_redact_data_hides_values_below_secret_names_and_keeps_the_rest() -> None:
    data = {"tokenizer": {"model": "m"}, "api_key": "abc", "list": ["hunter22", 3], "token": ""}
    assert redact_data(data, ["hunter22"]) == {
        "tokenizer": {"model": "m"},
        "api_key": HIDDEN,
        "list": [HIDDEN, 3],
        "token": "",
    }
