"""One client for any OpenAI-compatible inference server: vLLM with its extras, or a vendor's.

Promises: what passes by itself is waited for (``preceptor.patient_http``), anything else is one PreceptorError. A
server that comes back without the adapters that were loaded into it gets them again. What is sampled is what was asked
for: defaults of the server's are overruled.

All methods may be called from several threads at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from preceptor.errors import PreceptorError
from preceptor.patient_http import AWAY, FIRST_PAUSE_SECONDS, SHOWN_CHARACTERS, PatientHttp, error_of, json_object

log = logging.getLogger(__name__)

# The first with everything that is used here: `return_token_ids`, and adapters that are checked when they are loaded.
OLDEST_VLLM = (0, 11)
# Nats per token that two servers of the same weights may differ by: bfloat16 is off by about 0.01.
PROBE_TOLERANCE = 0.05
# Below this an adapter changes too little to be told from the base in bfloat16.
_PROBE_TELLS = 0.02
# What vLLM would otherwise take from the model's generation_config.json.
_PLAIN = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of a server: ``root`` is where it was loaded from, ``parent`` is set for an adapter."""

    id: str
    root: str = ""
    parent: str = ""
    max_model_len: int = 0  # 0: not said


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. ``models`` is empty where it keeps no list."""

    kind: str  # vllm | other
    version: str
    models: tuple[ServedModel, ...]

    def model(self, model_id: str) -> ServedModel | None:
        """The model of this name, if it is served."""
        return next((model for model in self.models if model.id == model_id), None)


@dataclass(frozen=True, slots=True)
class Completed:
    """What follows a prompt: token ids without the one that ended it.

    ``finished`` is False where it ran into its limit. ``logprobs``: of each of these tokens under the model itself
    (temperature 1, all tokens), in nats, and then of the end token where there is one; empty where not asked for.
    """

    token_ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """The answer of a chat model. ``tokens`` is 0 where the server does not count."""

    text: str
    finished: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What tells an adapter from others: the log-probability of ``continuation`` behind ``prompt`` (token ids) with it,
    and with the base model alone (nan: nobody knows), in nats, summed over the tokens; and how far off each may be."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    logprob: float
    base_logprob: float = math.nan
    tolerance: float = PROBE_TOLERANCE


class _Lost(Exception):
    """The server was restarted while an adapter was being looked at."""


class InferenceServer:
    """A server at ``url`` (with or without /v1), and ``model``, the name under which it serves the base model."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str = "",
        *,
        concurrency: int = 64,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 600.0,
    ) -> None:
        parts = urlsplit(url.rstrip("/"))
        path = parts.path.rstrip("/")
        self.url = urlunsplit(parts._replace(path=path.removesuffix("/v1")))
        # a path of the user's own is the whole of it, like .../v1beta/openai
        self._api = self.url + ("/v1" if path in ("", "/v1") or path.endswith("/v1") else "")
        self.model = model
        self._http = PatientHttp(
            self.url,
            api_key,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
        )
        self._patience = patience_seconds
        self._adapters: dict[str, tuple[str, Probe | None]] = {}  # the loaded ones; folders are as the server sees them
        self._loading = asyncio.Lock()  # of the client's thread
        self._refused_fields: set[str] = set()  # of chat completions, which vendors take or not

    def close(self) -> None:
        """Closes all connections; what is under way ends with CANCELLED."""
        self._http.close()

    def check(self) -> ServerFacts:
        """What the server is, once it answers.

        Raises PreceptorError: SERVER_UNREACHABLE, SERVER_REFUSED, SERVER_UNREADABLE, SERVER_TOO_OLD and, where the
        server is vLLM and does not serve ``model``, MODEL_NOT_SERVED.
        """
        return self._http.wait(self._check())

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        model: str | Sequence[str] = "",
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        logprobs: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Completed]:
        """One completion per prompt (token ids), all asked at once; vLLM only.

        ``max_tokens`` and ``model`` are one for all or one each; an empty model is the base. Where the server's prefix
        cache is on, prompts that are equal are read once. ``seeds`` make the same call give the same completions as far
        as the server's arithmetic does. ``stopped`` is asked ten times a second, ``on_done`` is called once for each
        that is done, both in the caller's thread; what they raise passes through, and ends what is under way.

        Raises PreceptorError: SERVER_UNREACHABLE, SERVER_REFUSED, SERVER_UNREADABLE, SERVER_TOO_OLD, MODEL_NOT_SERVED,
        PROMPT_TOO_LONG, and CANCELLED when ``stopped`` says so.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        common = {**_PLAIN, "temperature": temperature, "top_p": top_p, "return_token_ids": True}
        if logprobs:
            common |= {"logprobs": 0}
        bodies = []
        for row, (prompt, name) in enumerate(zip(prompts, self._models(model, len(prompts)), strict=True)):
            body = common | {"model": name, "prompt": list(prompt), "max_tokens": limits[row]}
            body |= {"stop_token_ids": list(stop_token_ids), "stop": list(stop)}
            if seeds is not None:
                body["seed"] = seeds[row]
            bodies.append(body)
        return self._http.wait_for_all([self._completion(body) for body in bodies], stopped, on_done)

    def score(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        model: str | Sequence[str] = "",
        stopped: Callable[[], bool] = lambda: False,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Log-probability in nats of each row's continuation behind its prompt, summed over its tokens; vLLM only.

        Both are token ids, neither is empty. ``model``, ``stopped``, ``on_done`` and what is raised: see ``complete``.
        """
        models = self._models(model, len(rows))
        asked = [
            self._score(name, list(prompt), list(continuation))
            for name, (prompt, continuation) in zip(models, rows, strict=True)
        ]
        return self._http.wait_for_all(asked, stopped, on_done)

    def chat(
        self,
        messages: Sequence[Sequence[tuple[str, str]]],
        *,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Said]:
        """One answer per conversation (pairs of role and text) of ``model``, all asked at once; any vendor's.

        A vendor that does not know ``seed`` is not sent it again, one that wants its limit under another name gets
        that; a temperature that is not taken is an error, for other completions would come than were asked for.

        Raises PreceptorError: SERVER_UNREACHABLE, SERVER_REFUSED, SERVER_UNREADABLE, MODEL_NOT_SERVED, PROMPT_TOO_LONG,
        and CANCELLED when ``stopped`` says so.
        """
        limits = [max_tokens] * len(messages) if isinstance(max_tokens, int) else list(max_tokens)
        asked = []
        for row, conversation in enumerate(messages):
            said = [{"role": role, "content": text} for role, text in conversation]
            body = {"model": self.model, "messages": said, "temperature": temperature, "top_p": top_p}
            body |= {"max_tokens": limits[row]} | ({} if seeds is None else {"seed": seeds[row]})
            asked.append(self._said(body))
        return self._http.wait_for_all(asked, stopped, on_done)

    def load_adapter(self, name: str, folder: Path | str, probe: Probe | None = None) -> None:
        """Loads the LoRA adapter in ``folder`` (as the server sees it; PEFT's format), looks that it is listed and,
        with a ``probe``, that it is at work and the right one.

        A name stands for one content for ever: give a hash. One that is listed already is not loaded again, for vLLM
        would answer from old caches. Without a probe, be careful: vLLM takes adapters that were made for other models
        and answers nonsense with them. It keeps in memory what fits and forgets the rest without a word
        (``--max-loras``, ``--max-cpu-loras``).

        Raises PreceptorError: SERVER_CANNOT_ADAPT (started without it), ADAPTER_MISMATCH (it is not taken, or not what
        the probe says), ADAPTER_NOT_SEEN (the server does not see the folder), and what ``check`` raises.
        """
        self._http.wait(self._load(name, str(folder), probe))
        self._adapters[name] = (str(folder), probe)

    def unload_adapter(self, name: str) -> None:
        """Has the server forget an adapter; what it does not know is no error. Raises what ``load_adapter`` does."""
        self._adapters.pop(name, None)
        self._http.wait(self._unload(name))

    def adapters(self) -> list[str]:
        """Names of the adapters that the server knows now, the first loaded first."""
        return [model.id for model in self._http.wait(self._models_served()) if model.parent]

    def tokens(self, text: str) -> list[int]:
        """The ids of a text by the server's own tokenizer, special tokens included; vLLM only."""
        return self._http.wait(self._tokens(text))

    def sleep(self) -> None:
        """Frees the server's GPU memory until ``wake``: weights go to the host's, caches are dropped. Requests wait.

        Raises PreceptorError: SERVER_CANNOT_SLEEP (started without it), and what ``check`` raises.
        """
        self._http.wait(self._switch("POST", "/sleep?level=1"))

    def wake(self) -> None:
        """Ends ``sleep``; a server that is awake stays so. Raises what ``sleep`` does."""
        self._http.wait(self._switch("POST", "/wake_up"))

    def sleeping(self) -> bool:
        """Whether it sleeps. Raises what ``sleep`` does."""
        return bool(self._http.wait(self._switch("GET", "/is_sleeping")).get("is_sleeping"))

    # -- the caller's side

    def _models(self, model: str | Sequence[str], rows: int) -> list[str]:
        names = [model] * rows if isinstance(model, str) else list(model)
        return [name or self.model for name in names]

    # -- requests

    async def _check(self) -> ServerFacts:
        status, content = await self._http.ask("GET", f"{self._api}/models")
        if status == 404:  # some vendors keep no list
            return ServerFacts("other", "", ())
        models, owner = self._read_models(status, content)
        if owner != "vllm":
            return ServerFacts("other", "", models)
        _, content = await self._http.ask("GET", f"{self.url}/version")
        version = str(json_object(content).get("version", ""))
        found = re.match(r"(\d+)\.(\d+)", version)
        if found and (int(found[1]), int(found[2])) < OLDEST_VLLM:
            oldest = ".".join(map(str, OLDEST_VLLM))
            raise PreceptorError("SERVER_TOO_OLD", f"{self.url} is vLLM {version}; {oldest} or newer is needed")
        facts = ServerFacts("vllm", version, models)
        if self.model and facts.model(self.model) is None:
            raise self._not_served(self.model, ", ".join(model.id for model in models if not model.parent))
        return facts

    async def _models_served(self) -> tuple[ServedModel, ...]:
        return self._read_models(*await self._http.ask("GET", f"{self._api}/models"))[0]

    def _read_models(self, status: int, content: bytes) -> tuple[tuple[ServedModel, ...], str]:
        """The models, and who owns the first."""
        if status != 200:
            raise self._refused(status, content)
        try:
            listed = json.loads(content)["data"]
            models = tuple(
                ServedModel(
                    str(model["id"]),
                    str(model.get("root") or ""),
                    str(model.get("parent") or ""),
                    int(model.get("max_model_len") or 0),
                )
                for model in listed
            )
            return models, str(listed[0].get("owned_by", "")) if listed else ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._unreadable("/models", content) from None

    async def _completion(self, body: dict[str, Any]) -> Completed:
        content = await self._of_model("/completions", body)
        try:
            choice = json.loads(content)["choices"][0]
            finished = choice["finish_reason"] == "stop"
            ids, stop = choice.get("token_ids"), choice.get("stop_reason")
            if ids is None:
                raise PreceptorError(
                    "SERVER_TOO_OLD",
                    f"{self.url} gives no token ids (`return_token_ids`); it must be vLLM "
                    f"{'.'.join(map(str, OLDEST_VLLM))} or newer",
                )
            tokens = tuple(map(int, ids))
            logprobs: tuple[float, ...] = ()
            if "logprobs" in body:
                logprobs = tuple(map(float, choice["logprobs"]["token_logprobs"]))
                if len(logprobs) != len(tokens):
                    raise ValueError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise self._unreadable("/completions", content) from None
        # A stop string lies in the tokens somewhere; an end token is the last of them.
        if finished and not isinstance(stop, str):
            tokens = tokens[:-1]
        return Completed(tokens, finished, logprobs)

    async def _score(self, model: str, prompt: list[int], continuation: list[int]) -> float:
        content = await self._of_model("/completions", _scoring(model, prompt, continuation))
        return self._summed(content, len(prompt), continuation)

    def _summed(self, content: bytes, start: int, continuation: Sequence[int]) -> float:
        try:
            places = json.loads(content)["choices"][0]["prompt_logprobs"][start:]
            scores = [float(place[str(token)]["logprob"]) for place, token in zip(places, continuation, strict=True)]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise self._unreadable("/completions", content) from None
        return math.fsum(scores)

    async def _said(self, body: dict[str, Any]) -> Said:
        while True:
            sent = self._vendors_words(body)
            status, content = await self._http.ask("POST", f"{self._api}/chat/completions", sent)
            if status == 200:
                break
            if status == 400 and self._learns_from(sent, content):
                continue
            raise self._refused(status, content)
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
            return Said(text if isinstance(text, str) else "", choice["finish_reason"] == "stop", int(tokens))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise self._unreadable("/chat/completions", content) from None

    def _vendors_words(self, body: dict[str, Any]) -> dict[str, Any]:
        sent = dict(body)
        if "seed" in self._refused_fields:
            sent.pop("seed", None)
        if "max_tokens" in self._refused_fields:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        return sent

    def _learns_from(self, sent: dict[str, Any], content: bytes) -> bool:
        """Whether a request that was refused is worth sending again, for it is another one now."""
        error = error_of(content)
        said = f"{error.get('message', '')} {error.get('param', '')}"
        for field in ("max_tokens", "seed"):
            if field in sent and re.search(rf"\b{field}\b", said) and not _too_long(error):
                self._refused_fields.add(field)
                log.info("%s does not take %s", self.url, field)
                return True
        return False

    async def _load(self, name: str, folder: str, probe: Probe | None) -> None:
        async with self._loading:
            end = time.monotonic() + self._patience
            while True:
                with suppress(_Lost):
                    if not await self._is_listed(name):
                        await self._load_once(name, folder)
                    if probe is not None:
                        await self._verify(name, folder, probe)
                    return
                if time.monotonic() > end:
                    raise PreceptorError(
                        "SERVER_UNREADABLE",
                        f"{self.url} takes the adapter {name} and does not have it then: are there several servers "
                        "behind this address?",
                    )
                await asyncio.sleep(FIRST_PAUSE_SECONDS)

    async def _is_listed(self, name: str) -> bool:
        return any(model.id == name for model in await self._models_served())

    async def _load_once(self, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder}
        url = f"{self._api}/load_lora_adapter"
        # with 500 it says that it cannot use the adapter
        status, content = await self._http.ask("POST", url, body, passing_5xx=AWAY)
        said = str(error_of(content).get("message", ""))
        if (status == 404 and said in ("", "Not Found")) or "LoRA is not enabled" in said:
            raise self._cannot_adapt()
        if status == 404:
            raise PreceptorError("ADAPTER_NOT_SEEN", f"{self.url} sees no adapter in {folder}", file=folder)
        if status == 200 or "already been loaded" in said:
            if await self._is_listed(name):
                return
            raise _Lost
        if status not in (400, 422, 500):
            raise self._refused(status, content)
        raise PreceptorError(
            "ADAPTER_MISMATCH", f"{self.url} does not take the adapter {folder}: {self._http.shown(said)}", file=folder
        )

    async def _verify(self, name: str, folder: str, probe: Probe) -> None:
        status, content = await self._http.ask(
            "POST", f"{self._api}/completions", _scoring(name, probe.prompt, probe.continuation)
        )
        if status == 404:
            raise _Lost
        if status != 200:
            raise self._refused(status, content, name)
        found = self._summed(content, len(probe.prompt), probe.continuation)
        tokens, base = len(probe.continuation), probe.base_logprob
        off = abs(found - probe.logprob)
        tells = abs(probe.logprob - base) > _PROBE_TELLS * tokens
        without = "" if math.isnan(base) else f", and {base:.3f} without the adapter"
        if not off <= probe.tolerance * tokens or (tells and off >= abs(found - base)):
            await self._unload(name)
            raise PreceptorError(
                "ADAPTER_MISMATCH",
                f"{self.url} with the adapter {folder} gives a text of {tokens} tokens the logprob {found:.3f}; "
                f"it should be {probe.logprob:.3f}{without}: the server serves another base "
                "model than the adapter was trained on, or does not use it",
                file=folder,
            )

    async def _unload(self, name: str) -> None:
        status, content = await self._http.ask("POST", f"{self._api}/unload_lora_adapter", {"lora_name": name})
        if status == 404 and not error_of(content):
            raise self._cannot_adapt()
        if status not in (200, 404):
            raise self._refused(status, content)

    async def _switch(self, method: str, path: str) -> dict[str, Any]:
        status, content = await self._http.ask(method, self.url + path, passing_5xx=AWAY)
        if status in (404, 500):
            said = self._http.shown(str(error_of(content).get("message", "")))
            raise PreceptorError(
                "SERVER_CANNOT_SLEEP",
                f"{self.url}{path.partition('?')[0]} answered HTTP {status}{': ' if said else ''}{said}",
            )
        if status != 200:
            raise self._refused(status, content)
        return json_object(content)

    async def _tokens(self, text: str) -> list[int]:
        status, content = await self._http.ask("POST", f"{self.url}/tokenize", {"model": self.model, "prompt": text})
        if status != 200:
            raise self._refused(status, content)
        try:
            return [int(token) for token in json.loads(content)["tokens"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._unreadable("/tokenize", content) from None

    async def _of_model(self, path: str, body: dict[str, Any]) -> bytes:
        """The content of a good answer. An adapter that was loaded and is gone (the server was restarted) is loaded
        again."""
        end = 0.0
        while True:
            status, content = await self._http.ask("POST", self._api + path, body)
            if status == 200:
                return content
            name = body["model"]
            adapter = self._adapters.get(name)
            if status != 404 or adapter is None:
                raise self._refused(status, content, name)
            end = end or time.monotonic() + self._patience
            if time.monotonic() > end:
                raise self._refused(status, content, name)
            log.warning("%s has lost adapter %s; it is loaded again", self.url, name)
            await self._load(name, *adapter)

    # -- what is said of it

    def _refused(self, status: int, content: bytes, model: str = "") -> PreceptorError:
        error = error_of(content)
        said = self._http.shown(str(error.get("message") or content[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace")))
        if status == 404 and (error.get("param") == "model" or "model" in str(error.get("code") or said)):
            return self._not_served(model or self.model, "", said)
        if _too_long(error):
            return PreceptorError("PROMPT_TOO_LONG", f"{self.url}: {said}")
        return PreceptorError("SERVER_REFUSED", f"{self.url} answered HTTP {status}{': ' if said else ''}{said}")

    def _not_served(self, model: str, served: str, said: str = "") -> PreceptorError:
        more = f"; it serves {served}" if served else f" ({said})" if said else ""
        return PreceptorError("MODEL_NOT_SERVED", f"{self.url} does not serve {model!r}{more}")

    def _cannot_adapt(self) -> PreceptorError:
        return PreceptorError("SERVER_CANNOT_ADAPT", f"{self.url} was started without adapters at run time")

    def _unreadable(self, path: str, content: bytes) -> PreceptorError:
        begins = self._http.shown(content[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace"))
        return PreceptorError("SERVER_UNREADABLE", f"{self.url}{path} answered what no such server does: {begins!r}")


def _scoring(model: str, prompt: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
    """What asks for the log-probabilities of a prompt's tokens."""
    tokens = [*prompt, *continuation]
    return {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}


def _too_long(error: dict[str, Any]) -> bool:
    message = str(error.get("message", ""))
    return error.get("code") == "context_length_exceeded" or "maximum context length" in message
