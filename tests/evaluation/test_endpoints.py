"""Where a reader or a grader is asked, and that its key shows itself nowhere."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest

from stairstep.evaluation.endpoints import OPENAI_URL, Endpoint, EndpointSettings, Secret, read_secret, resolve_endpoint
from stairstep.settings import InputError, RecipeError, build, from_plain, json_schema, to_plain

KEY = "sk-test-canary-0123456789"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "A_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def made(**values):
    return build(EndpointSettings, from_plain({"model": "m", **values}, "test"))


def test_settings_are_documented_and_survive_a_round_trip():
    assert all(one.metadata.get("doc") for one in dataclasses.fields(EndpointSettings))
    json_schema(EndpointSettings, "endpoint")
    settings = made(base_url="https://host.example:8443/v1")
    assert build(EndpointSettings, from_plain(to_plain(settings), "again")) == settings


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("base_url", "127.0.0.1:8000/v1", "expected an address"),
        ("base_url", "ftp://host/v1", "expected an address"),
        ("base_url", "http://", "expected an address"),
        ("base_url", "http://host:port/v1", "cannot be read"),
        ("base_url", "http://host/v1?api_key=hidden", "without ? and #"),
        ("base_url", "http://user:hidden@host/v1", "must not hold a user or password"),
        ("key_env", "sk-test-hidden", "NAME of an environment variable"),
        ("key_env", "hidden0hidden0", "NAME of an environment variable"),
        ("model", " ", "expected the model's name"),
    ],
)
def test_what_an_endpoint_cannot_be(key, value, told):
    with pytest.raises(RecipeError) as caught:
        made(**{key: value})
    assert f"{key}: " in str(caught.value) and told in str(caught.value)
    assert "hidden" not in str(caught.value), "a secret pasted into the wrong place is not repeated"


def test_a_key_comes_from_the_variable_or_from_a_file(monkeypatch, tmp_path):
    assert read_secret("A_KEY") is None
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("A_KEY_FILE", str(file))
    assert read_secret("A_KEY").reveal() == KEY
    monkeypatch.setenv("A_KEY", KEY)
    assert read_secret("A_KEY").reveal() == KEY, "the same key twice is no contradiction"
    monkeypatch.setenv("A_KEY", "another")
    with pytest.raises(InputError, match="to different keys") as caught:
        read_secret("A_KEY")
    assert KEY not in str(caught.value) and "another" not in str(caught.value)
    monkeypatch.delenv("A_KEY_FILE")
    assert read_secret("A_KEY").reveal() == "another"


@pytest.mark.parametrize(
    ("content", "told"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe", "ASCII"), (f"{KEY}\nsecond".encode(), "white space")]
)
def test_a_file_without_a_key_is_told(monkeypatch, tmp_path, content, told):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("A_KEY_FILE", str(file))
    with pytest.raises(InputError, match=told) as caught:
        read_secret("A_KEY")
    assert "A_KEY" in str(caught.value) and KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_secret_shows_itself_to_nobody():
    secret = Secret(KEY)
    endpoint = Endpoint("http://127.0.0.1/v1", secret, "here")
    for shown in (repr(secret), str(secret), f"{secret}", repr(endpoint), f"{[endpoint]}"):
        assert KEY not in shown
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            travel(endpoint if travel is not copy.copy else secret)
    assert secret.hidden_in(f"Bearer {KEY}.") == "Bearer ***."


def test_the_address_is_the_recipes_or_the_variables_or_openais(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert resolve_endpoint(made(), "grader").base_url == OPENAI_URL
    monkeypatch.setenv("OPENAI_BASE_URL", "https://us.api.openai.com/v1")
    found = resolve_endpoint(made(), "grader")
    assert (found.base_url, found.source) == ("https://us.api.openai.com/v1", "the variable OPENAI_BASE_URL")
    found = resolve_endpoint(made(base_url="http://127.0.0.1:1/v1"), "grader")
    assert (found.base_url, found.source, found.local) == ("http://127.0.0.1:1/v1", "evaluation.grader.base_url", True)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hidden@gateway/v1")
    with pytest.raises(InputError, match=r"OPENAI_BASE_URL: .*user or password") as caught:
        resolve_endpoint(made(), "grader")
    assert "hidden" not in str(caught.value)


def test_openai_needs_a_key_and_a_server_of_ones_own_none(monkeypatch):
    with pytest.raises(InputError, match=r"grader .* needs a key: set the variable A_KEY, or A_KEY_FILE"):
        resolve_endpoint(made(key_env="A_KEY"), "grader")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://eu.api.openai.com/v1")
    with pytest.raises(InputError, match="needs a key"):
        resolve_endpoint(made(), "grader")
    assert resolve_endpoint(made(base_url="http://localhost:8000/v1"), "reader").key is None


def test_openais_key_over_an_open_line_is_told(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("A_KEY", KEY)
    with caplog.at_level(logging.WARNING):
        resolve_endpoint(made(base_url="http://localhost:1/v1"), "grader")
        resolve_endpoint(made(base_url="https://far.example/v1"), "grader")
        resolve_endpoint(made(base_url="http://far.example/v1", key_env="A_KEY"), "grader")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        resolve_endpoint(made(base_url="http://far.example/v1"), "grader")
    assert "unencrypted to far.example" in caplog.text and KEY not in caplog.text
