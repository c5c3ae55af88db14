"""Where a reader or a grader is asked, and with which key: any endpoint that speaks OpenAI's chat protocol.

A key comes from the environment variable that the settings name, or from the file that `<variable>_FILE` names, and from nowhere else: it
is no recipe value, it shows itself in no repr, message or log, and it cannot be pickled, so it never travels with a job.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from stairstep.settings import InputError, SettingError, setting

_log = logging.getLogger(__name__)
OPENAI_URL = "https://api.openai.com/v1"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_KEY = "OPENAI_API_KEY"
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_PLACEHOLDERS = frozenset(
    {"empty", "none", "null", "dummy", "fake", "placeholder", "not-needed", "no-key", "no-key-required", "sk-no-key-required"}
)
"""Words that servers without keys are given for one, in small letters."""
_SHORT = 8  # characters; no service gives keys so short
_KEY = re.compile(r"[\x21-\x7e]+")  # what an HTTP header may carry; a library that refuses others would quote them in its error


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible endpoint and how it is asked."""

    model: str = setting(doc="The model's name at the endpoint.")
    base_url: str | None = setting(
        None, doc="Address of the endpoint, mostly ending in /v1; null: the variable OPENAI_BASE_URL, or else OpenAI itself."
    )
    revision: str | None = setting(
        None, doc="Which weights stand behind the model's name; what was asked of another revision is asked anew. null: not told apart."
    )
    key_env: str = setting(OPENAI_KEY, doc="NAME of the variable that holds the key, or with _FILE behind it the path of a file that does.")
    concurrency: int = setting(16, doc="Requests in flight at once.", minimum=1, maximum=512)
    timeout_s: float = setting(120.0, doc="Seconds until a request without a whole reply is given up.", above=0)
    attempts: int = setting(6, doc="Most requests for one question, the first among them.", minimum=1)
    backoff_s: float = setting(
        0.5, doc="Seconds before the second attempt, doubled for each further one up to 16 times as many, with jitter.", above=0
    )
    breaker: int = setting(20, doc="Failed requests in a row, with no reply between them, that make an outage.", minimum=1)
    patience_s: float = setting(10.0, doc="Seconds that those failures must span: a replica may take that long to come back.", minimum=0)
    probe_s: float = setting(
        30.0, doc="Seconds of an outage after which one question tries the endpoint again; the others fail at once.", above=0
    )

    def check(self) -> None:
        """An address without secrets in it, and a variable's name where a key may have been pasted."""
        if not self.model.strip():
            raise SettingError("model", "expected the model's name at the endpoint, found an empty text")
        if self.base_url is not None and (fault := _url_fault(self.base_url)):
            raise SettingError("base_url", fault)
        if not _VARIABLE.fullmatch(self.key_env):
            raise SettingError(
                "key_env", f"expected the NAME of an environment variable, as in {OPENAI_KEY}; a key itself must never stand in a recipe"
            )


class Secret:
    """A value that only `reveal` shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one request that needs it."""
        return self._value

    def hidden_in(self, text: str) -> str:
        """The text with every occurrence of the value blotted out; a word such as EMPTY is no secret, and stays."""
        return text if self.placeholder else text.replace(self._value, "***")

    @property
    def placeholder(self) -> bool:
        """Whether this is a word that only stands for a key."""
        return self._value.casefold() in _PLACEHOLDERS

    @property
    def short(self) -> bool:
        """Whether this is so short a key that its letters may well stand in an answer."""
        return not self.placeholder and len(self._value) < _SHORT

    def __repr__(self) -> str:
        return "Secret(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is never pickled: each process reads it from its own environment")


@dataclass(frozen=True)
class Endpoint:
    """Settings met with an environment: an address and the key that it is given, if any."""

    base_url: str
    key: Secret | None
    source: str  # of the address, in words for a message

    @property
    def host(self) -> str:
        """The host that is asked."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def local(self) -> bool:
        """Whether the endpoint runs on this machine, where no proxy stands between."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")


def resolve_endpoint(settings: EndpointSettings, who: str) -> Endpoint:
    """The address and key of `who` (reader or grader) in this process's environment; InputError where a key is needed and missing."""
    key = read_secret(settings.key_env)
    set_here = f"evaluation.{who}.base_url"
    if settings.base_url is not None:
        endpoint = Endpoint(settings.base_url, key, set_here)
    elif given := os.environ.get(URL_VARIABLE, "").strip():
        if fault := _url_fault(given):
            raise InputError(f"the variable {URL_VARIABLE}: {fault}")
        endpoint = Endpoint(given, key, f"the variable {URL_VARIABLE}")
    else:
        endpoint = Endpoint(OPENAI_URL, key, f"the default of {set_here}")
    if key is None and _is_openai(endpoint.host):
        raise InputError(
            f"the {who} at {endpoint.base_url} needs a key: set the variable {settings.key_env}, or {settings.key_env}_FILE to a file that"
            f" holds it; or choose another {who} with evaluation.{who}.base_url or evaluation.{who}.kind"
        )
    if key is not None and settings.key_env == OPENAI_KEY and endpoint.base_url.startswith("http://") and not endpoint.local:
        _log.warning("the key in %s is sent unencrypted to %s, the host of the %s", OPENAI_KEY, endpoint.host, who)
    if key is not None and key.short:
        advice = "a server without keys is given EMPTY, which is left as it is"
        _log.warning(
            "the key in %s is short: wherever its letters stand in a reply of the %s they become ***; %s", settings.key_env, who, advice
        )
    return endpoint


def read_secret(name: str) -> Secret | None:
    """The secret in the variable `name` or in the file that `<name>_FILE` names; None where neither is set."""
    found = os.environ.get(name, "").strip()
    file = os.environ.get(f"{name}_FILE", "").strip()
    if file:
        try:
            in_file = Path(file).read_text(encoding="ascii").strip()
        except OSError as error:
            raise InputError(f"the variable {name}_FILE names {file}, which cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise InputError(f"the variable {name}_FILE names {file}, which holds more than plain ASCII text: not a key") from None
        if not in_file:
            raise InputError(f"the variable {name}_FILE names {file}, which is empty; expected a key")
        if found and found != in_file:
            raise InputError(f"both {name} and {name}_FILE are set, to different keys; unset one of them")
        found = in_file
    if not found:
        return None
    if not _KEY.fullmatch(found):
        raise InputError(f"the key in {name} holds white space, line breaks or characters other than ASCII: not a key; is it pasted whole?")
    return Secret(found)


def _is_openai(host: str) -> bool:
    return host == "api.openai.com" or host.endswith(".api.openai.com")


def _url_fault(text: str) -> str | None:
    """What is wrong with an address; says nothing of its user and password."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "expected an address such as http://127.0.0.1:8000/v1, found one that cannot be read"
    if parts.username is not None or parts.password is not None:
        return "an address must not hold a user or password; give the key in a variable (key_env)"
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", text):
        return f"expected an address such as http://127.0.0.1:8000/v1, found {_without_query(parts)!r}"
    if parts.query or parts.fragment:
        return f"expected an address without ? and #, found {_without_query(parts)!r} with them"
    return None


def _without_query(parts: SplitResult) -> str:
    return parts._replace(query="", fragment="").geturl()
