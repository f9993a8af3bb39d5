"""Lines of OpenAI's Batch API: requests to two of its endpoints, answered by output lines in its format.

Source: https://platform.openai.com/docs/api-reference/batch (request-input, request-output). A line that cannot be
generated gets a response with status 400, as in OpenAI's error files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.batch_file.openai_endpoints import ENDPOINTS, Endpoint
from llama_jax.batch_file.records import OPENAI_ID, Record
from llama_jax.batch_file.request import Draft, Request, sampling
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation.outputs import RequestOutput
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

ENVELOPE = ("custom_id", "method", "url", "body")


def is_openai(content: Mapping[str, Any]) -> bool:
    """Whether a line is meant for the Batch API."""
    return any(name in content for name in ENVELOPE)


@dataclass(frozen=True)
class OpenAILine:
    """A line with "custom_id", "method", "url" and "body".

    Attributes:
      custom_id: the sender's id.
      endpoint: the endpoint that answers it, once it has been read.
    """

    index: int
    custom_id: Any
    endpoint: Endpoint | None = None

    @classmethod
    def of(cls, index: int, content: Mapping[str, Any]) -> OpenAILine:
        """The line with this number."""
        return cls(index, content.get("custom_id"))

    @property
    def key(self) -> tuple[str, Any] | None:
        """Its custom_id."""
        return None if self.custom_id is None else ("custom_id", self.custom_id)

    def read(self, content: Mapping[str, Any], base: SamplingParams) -> Draft:
        """See `request.Line`. Fields missing in the body default to `base`, not to OpenAI's defaults."""
        url, given = _opened(content)
        endpoint, body = ENDPOINTS[url].of(given)
        params = sampling(body, base, self.index)
        line = dataclasses.replace(self, endpoint=endpoint)
        model = body.get("model")
        return Draft(
            line,
            endpoint.prompts(body, params),
            params,
            limited="max_tokens" in body,
            model=None if model is None else str(model),
        )

    def refused(self, error: LlamaJaxError) -> Record:
        """See `request.Line`."""
        message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
        param = error.param if isinstance(error, RequestError) else None
        of = {"message": message, "type": "invalid_request_error", "param": param, "code": type(error).__name__}
        return self._record(400, {"error": of})

    def answered(
        self, request: Request, outputs: Sequence[RequestOutput], model: Model, tokenizer: Tokenizer
    ) -> Record:
        """See `request.Line`; the choices of several prompts follow one another."""
        assert self.endpoint is not None
        made = [(output, completion) for output in outputs for completion in output.outputs]
        read, written = sum(map(len, request.prompts)), sum(len(c.token_ids) for _, c in made)
        return self._record(
            200,
            {
                "id": f"{self.endpoint.prefix}-{self.index}",
                "object": self.endpoint.object,
                "created": int(time.time()),
                "model": request.adapter(model) or model.name,
                "choices": [
                    {"index": i, **self.endpoint.choice(output, completion, request.params, tokenizer)}
                    for i, (output, completion) in enumerate(made)
                ],
                "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
            },
        )

    def _record(self, status: int, body: Record) -> Record:
        response = {"status_code": status, "request_id": f"req_{self.index}", "body": body}
        return {"id": f"{OPENAI_ID}{self.index}", "custom_id": self.custom_id, "response": response, "error": None}


def _opened(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The endpoint's address, and the body without null fields, which count as missing."""
    hint = 'a line of the Batch API is {"custom_id": "1", "method": "POST", "url": …, "body": {…}}'
    for name in (*ENVELOPE, *content):
        if name not in content or name not in ENVELOPE:
            what = "has no" if name in ENVELOPE else "has the unknown field"
            raise RequestError(f"the line {what} {name!r}", param=name, hint=hint)
    custom_id, method, url, body = (content[name] for name in ENVELOPE)
    if not isinstance(custom_id, str):
        raise RequestError(f"custom_id is {type(custom_id).__name__}, not text", param="custom_id", hint=hint)
    if method != "POST":
        raise RequestError(f"the method is {method!r:.40}", param="method", hint="it must be POST")
    if url not in ENDPOINTS:
        raise RequestError(f"there is no endpoint {url!r:.100}", param="url", hint=f"one of {', '.join(ENDPOINTS)}")
    if not isinstance(body, dict):
        raise RequestError(f"the body is {type(body).__name__}, not an object", param="body", hint=hint)
    return url, {name: value for name, value in body.items() if value is not None}
