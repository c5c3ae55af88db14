"""One question to an OpenAI-compatible endpoint, asked until it is answered or given up with a named reason.

Invariants: a question ends in a `Reply` or in `AskFailed`, within a bounded number of attempts and of seconds each; no failure is ever
turned into text. All threads of one client share its bound of requests in flight and its breaker: an outage is told in one log line, not
once a question, and later questions fail at once until a probe is answered. What comes from a server stands in messages shortened and
without the key.
"""

from __future__ import annotations

import email.utils
import json
import logging
import math
import random
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .deadline import Deadline
from .endpoints import URL_VARIABLE, Endpoint, EndpointSettings, resolve_endpoint

_log = logging.getLogger(__name__)

Kind = Literal["outage", "refused", "rejected", "limited", "timeout", "lost", "server", "malformed"]
Message = dict[str, Any]
SPENT = ("requests", "prompt_tokens", "completion_tokens")  # what a client counts

_REFUSED = (401, 402, 403, 404, 405)  # says something about key, address or model, not about this question
_TRANSIENT = (408, 409, 425)
_NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_REFUSALS = 3  # in a row: gateways do refuse a single request for no reason
_MOST_BYTES = 32_000_000  # of a reply
_REGION = re.compile(r"make your request to\s+(?:https?://)?([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)", re.IGNORECASE)
_SHOWN = 60  # characters of a reply that cannot be understood
_KEY_LIKE = re.compile(r"\b(?:sk|pk|hf)[-_][\w*-]{6,}")


class AskFailed(Exception):
    """A question that got no reply: what happened, in a word and in a sentence."""

    def __init__(self, reason: str, kind: Kind) -> None:
        super().__init__(reason, kind)
        self.reason = reason
        self.kind: Kind = kind

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Reply:
    """What a model said, why it stopped, and what that took; tokens are 0 where the endpoint does not tell."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    thought: bool = False  # whether the endpoint has taken a thought out of the text


class _Trouble(Exception):
    """One attempt that failed."""

    def __init__(self, kind: Kind, reason: str, wait: float | None = None, again: bool = True, alive: bool | None = False) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
        self.wait = wait  # seconds that the server asks for
        self.again = again  # whether another attempt may fare better
        self.alive = alive  # whether the endpoint works all the same, and this question is the matter; None: nothing was learnt


class Breaker:
    """Counts failures in a row over all threads of a client; past the bound there is an outage, until a probe is answered."""

    def __init__(self, settings: EndpointSettings, subject: str) -> None:
        self._settings, self._subject = settings, subject
        self._change = threading.Condition()
        self._failed = self._refused = 0
        self._since = self._probe_at = 0.0
        self._probing = False
        self.outage: str | None = None

    def enter(self) -> bool:
        """Let a request through, True if it is the probe of an outage; AskFailed at once where it must not go."""
        with self._change:
            if self.outage is None:
                return False
            if self._probing or time.monotonic() < self._probe_at:
                raise AskFailed(self.outage, "outage")
            self._probing = True
            return True

    def leave(self, probe: bool) -> None:
        """A request is over, however it ended."""
        if probe:
            with self._change:
                self._probing = False

    def answered(self) -> None:
        """The endpoint has replied: whatever failed before was not an outage, or is over."""
        with self._change:
            self._failed = self._refused = 0
            if self.outage is not None:
                self.outage = None
                _log.warning("%s answers again", self._subject)

    def failed(self, trouble: _Trouble) -> None:
        """An attempt failed: opens the breaker, and tells so, when that makes an outage."""
        settings, now = self._settings, time.monotonic()
        with self._change:
            self._since = now if not self._failed else self._since
            self._failed += 1
            self._refused = self._refused + 1 if trouble.kind == "refused" else 0
            if self.outage is not None:
                self._probe_at = now + settings.probe_s
                return
            lasting = self._failed >= settings.breaker and now - self._since >= settings.patience_s
            if not lasting and self._refused < _REFUSALS:
                return
            count = f"{self._failed} failures in a row" + (f" over {now - self._since:.0f} s" if now - self._since >= 1 else "")
            self.outage = f"{self._subject} is out ({count}): {trouble.reason}"
            self._probe_at = now + settings.probe_s
            self._change.notify_all()
        _log.error("%s. Further questions fail at once; one tries it again every %g s", self.outage, settings.probe_s)

    def pause(self, seconds: float) -> None:
        """Wait before another attempt, no longer than until an outage is known."""
        with self._change:
            self._change.wait_for(lambda: self.outage is not None, timeout=seconds)


class ChatClient:
    """Asks one endpoint from any number of threads; `who` (reader or grader) names it in messages and in the recipe's keys."""

    def __init__(self, endpoint: EndpointSettings, who: str) -> None:
        self.settings, self.who = endpoint, who
        self.endpoint = resolve_endpoint(endpoint, who)
        self._breaker = Breaker(endpoint, f"the {who} at {self.endpoint.base_url}")
        self._slots = threading.BoundedSemaphore(endpoint.concurrency)
        self._count = threading.Lock()
        self._limit_name = "max_tokens"
        self._deadline = Deadline()
        self._api, self._errors = _connect(self.endpoint, endpoint.timeout_s, self._deadline)
        self._spent = dict.fromkeys(SPENT, 0)

    @property
    def outage(self) -> str | None:
        """Why the endpoint counts as out, or None."""
        return self._breaker.outage

    @property
    def calls(self) -> int:
        """Requests sent, failed ones too."""
        return self.spent()["requests"]

    def spent(self) -> dict[str, int]:
        """Requests sent so far, failed ones too, and the tokens of all replies, also of those that were of no use."""
        with self._count:
            return dict(self._spent)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def ask(self, messages: Sequence[Message], max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """The reply to a conversation; AskFailed when it is given up. `more` goes into the request as it is."""
        request = {"messages": list(messages), "temperature": temperature, **more}
        with self._slots:
            for attempt in range(self.settings.attempts):
                probe = self._breaker.enter()
                try:
                    reply = self._attempt(request, max_tokens)
                except _Trouble as trouble:
                    last = probe or not trouble.again or attempt + 1 == self.settings.attempts
                    self._note(trouble, last)
                    if last:
                        raise self._given_up(trouble, attempt + 1) from None
                    _log.debug("the %s, attempt %d: %s", self.who, attempt + 1, trouble.reason)
                    wait = self._wait(attempt, trouble)
                else:
                    self._breaker.answered()
                    return reply
                finally:
                    self._breaker.leave(probe)
                self._breaker.pause(wait)
        raise AssertionError("the last attempt returns or raises")

    def _note(self, trouble: _Trouble, last: bool) -> None:
        """Tell the breaker: a rejected question was a sign of life, and a limit is a failure only to those whom it lets down."""
        if trouble.alive:
            self._breaker.answered()
        elif trouble.alive is False and (trouble.kind != "limited" or last):
            self._breaker.failed(trouble)

    def _given_up(self, trouble: _Trouble, attempts: int) -> AskFailed:
        if (outage := self._breaker.outage) is not None:
            return AskFailed(outage, "outage")
        return AskFailed(trouble.reason + (f" (given up after {attempts} attempts)" if attempts > 1 else ""), trouble.kind)

    def _wait(self, attempt: int, trouble: _Trouble) -> float:
        """Seconds before the next attempt; never less than the server asked for, and not the same for all threads."""
        unit = self.settings.backoff_s
        own = min(2.0**attempt, 16.0) * unit * random.uniform(0.5, 1.0)
        return own if trouble.wait is None else trouble.wait + random.uniform(0.0, unit)

    def _attempt(self, request: Mapping[str, Any], max_tokens: int) -> Reply:
        import openai

        limit_name = self._limit_name
        try:
            return self._sent(request, {limit_name: max_tokens})
        except openai.APITimeoutError:
            raise self._timed_out() from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise (self._timed_out() if isinstance(cause, TimeoutError) else self._lost(cause)) from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.body, error.response.headers, limit_name) from None
        except openai.OpenAIError as error:
            raise _Trouble("malformed", f"the {self.who} sent what cannot be understood: {self._clean(error)}") from None
        except UnicodeEncodeError as error:
            raise _Trouble(
                "rejected", f"the question holds characters that cannot be sent ({error.reason})", again=False, alive=None
            ) from None
        except self._errors as error:  # a body that breaks off comes past openai
            raise (self._timed_out() if "Timeout" in type(error).__name__ else self._lost(error)) from None

    def _sent(self, request: Mapping[str, Any], limit: Mapping[str, int]) -> Reply:
        """One request; the reply's bytes are read here, so that the clock and the bound hold for all of them."""
        with self._count:
            self._spent["requests"] += 1
        create = self._api.chat.completions.with_streaming_response.create
        body = bytearray()
        with self._deadline.within(self.settings.timeout_s), create(model=self.settings.model, **request, **limit) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_BYTES:
                    raise _Trouble("malformed", f"the {self.who}'s reply is longer than {_MOST_BYTES} bytes")
        return self._parsed(bytes(body))

    def _timed_out(self) -> _Trouble:
        return _Trouble("timeout", f"the {self.who} at {self.endpoint.base_url} gave no whole reply within {self.settings.timeout_s:g} s")

    def _lost(self, error: BaseException) -> _Trouble:
        hint = f"does it run there? The address is {self.endpoint.source}"
        said = self._clean(str(error) or type(error).__name__)
        return _Trouble("lost", f"no connection to the {self.who} at {self.endpoint.base_url} ({said}); {hint}")

    def _refusal(self, status: int, body: object, headers: Mapping[str, str], limit_name: str) -> _Trouble:
        """What a status other than 2xx means for this question and for the next one."""
        told = body.get("error", body) if isinstance(body, Mapping) else body
        found = told.get("message") if isinstance(told, Mapping) else told
        code = str(told.get("code") or told.get("type") or "") if isinstance(told, Mapping) else ""
        said = self._clean(found if isinstance(found, str) and found.strip() else "no message")
        saying = f"the {self.who} at {self.endpoint.base_url} said {status}"
        if region := _REGION.search(str(found)) if status in (401, 403, 421) else None:
            return _Trouble("refused", f"{saying}: {said}. {self._move_to(region[1].lower())}")
        if status == 429 and code in _NO_QUOTA:
            return _Trouble("refused", f"{saying}: {said}. The key in {self.settings.key_env} has no quota left")
        if status == 400 and limit_name == "max_tokens" and "max_completion_tokens" in str(found):
            self._limit_name = "max_completion_tokens"  # what newer models call it; older servers know only the other name
            return _Trouble("rejected", f"{saying}: {said}", wait=0.0, alive=True)
        wait = retry_after(headers)
        if status == 429 or status in _TRANSIENT or status >= 500:
            kind: Kind = "limited" if status == 429 else "server"
            if wait is not None and wait > self.settings.timeout_s:
                return _Trouble(kind, f"{saying}: {said}; it asks to wait {wait:.0f} s, more than timeout_s", again=False)
            return _Trouble(kind, f"{saying}: {said}", wait)
        if status in _REFUSED:
            return _Trouble("refused", f"{saying}: {said}. {self._mend(status)}")
        return _Trouble("rejected", f"{saying}: {said}", again=False, alive=True)

    def _move_to(self, host: str) -> str:
        """The key belongs to a region: which address to set, and where."""
        url = f"https://{host}/v1"
        key = f"evaluation.{self.who}.base_url"
        other = f" and {key}=null, or {key}={url}" if self.settings.base_url is not None else ""
        return f"The server asks for the host {host}: set {URL_VARIABLE}={url}{other}"

    def _mend(self, status: int) -> str:
        if status in (404, 405):
            return f"Is {self.settings.model} served there, and does the address end in /v1? It is {self.endpoint.source}"
        key = "no key was sent" if self.endpoint.key is None else "the key was not accepted"
        return f"{key.capitalize()}: check the variable {self.settings.key_env} (or {self.settings.key_env}_FILE)"

    def _parsed(self, body: bytes) -> Reply:
        """The reply in a body that must be a chat completion; whatever else came is told by its beginning."""
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            hint = f"no JSON; does the address end in /v1? It is {self.endpoint.source}"
            raise self._malformed(_beginning(body), hint) from None
        if isinstance(tree, Mapping) and tree.get("error"):
            error = tree["error"]
            said = error.get("message", error) if isinstance(error, Mapping) else error
            raise _Trouble("server", f"the {self.who} at {self.endpoint.base_url} said: {self._clean(said)}")
        usage = self._paid(tree)
        choices = tree.get("choices") if isinstance(tree, Mapping) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
            raise self._malformed(_beginning(body), "JSON, but no chat completion")
        finish = choice.get("finish_reason")
        finish = finish if isinstance(finish, str) else ""
        if finish == "content_filter":
            raise _Trouble("rejected", f"the {self.who}'s content filter stopped the reply", again=False, alive=True)
        thought = any(isinstance(message.get(key), str) and message[key].strip() for key in ("reasoning_content", "reasoning"))
        text = _text(message)
        if text is None and not (thought and finish == "length"):
            raise self._malformed(str(message.get("content")), f"no text in the reply, finish_reason {finish or 'missing'}", alive=True)
        said = self._without_key(text or "")
        return Reply(said, finish, usage["prompt_tokens"], usage["completion_tokens"], thought)

    def _paid(self, tree: object) -> dict[str, int]:
        """The tokens that a reply took, counted here: they are paid for whatever is made of the reply."""
        found = tree.get("usage") if isinstance(tree, Mapping) else None
        usage = {side: _tokens(found, side) if isinstance(found, Mapping) else 0 for side in SPENT[1:]}
        with self._count:
            for side, count in usage.items():
                self._spent[side] += count
        return usage

    def _without_key(self, text: str) -> str:
        """What a server said, without the key: gateways do tell their errors as replies, and replies are kept."""
        key = self.endpoint.key
        return text if key is None else key.hidden_in(text)

    def _malformed(self, beginning: str, hint: str, alive: bool = False) -> _Trouble:
        saying = f"the {self.who} at {self.endpoint.base_url} sent {self._clean(beginning)[:_SHOWN]!r}: {hint}"
        return _Trouble("malformed", saying, alive=alive)

    def _clean(self, said: object) -> str:
        """What a server said, on one line, short, and without anything like a key."""
        text = " ".join(str(said).split())
        text = _KEY_LIKE.sub("***", self._without_key(text)).rstrip(". ")
        return text if len(text) <= 300 else f"{text[:300]}…"


def _connect(endpoint: Endpoint, timeout_s: float, deadline: Deadline) -> tuple[Any, tuple[type[BaseException], ...]]:
    """The protocol's client, which tries nothing again by itself, and the errors that its HTTP library lets through."""
    import openai

    # An endpoint without a key is asked with a word for one: openai insists.
    key = "none" if endpoint.key is None else endpoint.key.reveal()
    watched = {"request": [deadline.watch]}
    # A proxy between this machine and itself would be in the way.
    http = openai.DefaultHttpxClient(trust_env=not endpoint.local, event_hooks=watched)
    timeout = openai.Timeout(timeout_s, connect=min(timeout_s, 10.0))
    client = openai.OpenAI(api_key=key, base_url=endpoint.base_url, max_retries=0, timeout=timeout, http_client=http)
    # Its name depends on openai's version; a piece of a body is read by it alone, and so it raises errors of its own.
    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    for name in (library.__name__, library.__name__.replace("httpx", "httpcore")):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line a request, and below that headers, in which a server may echo a key
    return client, (library.HTTPError, library.StreamError, OSError)


def _text(message: Mapping[str, Any]) -> str | None:
    """The text of a message: its content, the text parts of it, or the words of a refusal; None for none at all."""
    content = message.get("content")
    if isinstance(content, list):
        parts: Iterable[Any] = (part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text")
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if texts else None
    if isinstance(content, str):
        return content
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) and refusal.strip() else None


def _beginning(body: bytes) -> str:
    """Enough of a body to show; a key in it must not be cut before it is recognised."""
    return body[:4096].decode("utf-8", "replace")


def _tokens(usage: Mapping[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if type(value) is int and value >= 0 else 0


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, as milliseconds, seconds or a date; None where it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
