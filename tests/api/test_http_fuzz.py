"""Whatever a body holds, the answer is a success or a 4xx with an error object, and the server lives on."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvllm.api.schemas.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from support.doubles.server import LiveServer

BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
NUMBERS = [0, 1, -1, 2, 5, 20, 255, 2**31, 2**63, 2**64, 10**40, 0.5, -0.0, 1e-300, 1e300, -1e300]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.text(max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": VALUES}
    ),
    max_size=3,
)


@pytest.mark.parametrize("path", BODIES)
def test_random_fields(server: LiveServer, path: str) -> None:
    names = BODIES[path].__struct_fields__
    base = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
            "/v1/completions": {"prompt": "hi", "max_tokens": 2},
            "/tokenize": {"prompt": "hi"}, "/detokenize": {"tokens": [1]}}[path]  # fmt: skip

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3),
        st.one_of(st.none(), MESSAGES),
    )
    def check(fields: dict, messages: list | None) -> None:
        body = {**base, **fields}
        if messages is not None and "messages" in names:
            body["messages"] = messages
        status, headers, answer = server.raw("POST", path, json.dumps(body, allow_nan=False).encode())
        assert status < 500, (body, answer)
        if status == 200 and not headers["content-type"].startswith("text/event-stream"):
            json.loads(answer, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        if status != 200:
            error = json.loads(answer)["error"]
            assert error["message"]
            assert "Traceback" not in error["message"]

    check()
    assert server.chat(max_tokens=1)[0] == 200


@settings(max_examples=80, deadline=None)
@given(place=st.integers(0, 200), junk=st.binary(max_size=4), cut=st.integers(0, 200))
def test_mutated_bytes(place: int, junk: bytes, cut: int) -> None:
    from rvllm.api.http.body import parse
    from rvllm.api.http.errors import ApiError

    good = json.dumps(
        {"messages": [{"role": "user", "content": "é😀"}], "temperature": 0.5, "stop": ["a"]}
    ).encode()
    body = good[:place] + junk + good[place + len(junk) :] if cut % 2 else good[:cut]
    try:
        request = parse(body, ChatRequest)
    except ApiError as error:
        assert error.status == 400
    else:
        assert request.temperature is None or math.isfinite(request.temperature)
        json.dumps([str(m.content) for m in request.messages]).encode()
        str(request.messages[0].content if request.messages else "").encode()  # no lone surrogates
