"""Endpoints, fields and metric names that vLLM's clients and dashboards look for."""

from __future__ import annotations

import itertools
import json

import openai
from prometheus_client.parser import text_string_to_metric_families

from support.doubles.server import LiveServer

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{# </think> #}"
# vLLM's metrics of a text model on one GPU (its documentation's table, with the older names).
NAMES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries "
    "prefix_cache_hits external_prefix_cache_queries external_prefix_cache_hits mm_cache_queries "
    "mm_cache_hits num_preemptions prompt_tokens generation_tokens prompt_tokens_cached "
    "prompt_tokens_by_source request_success iteration_tokens_total request_prompt_tokens "
    "request_generation_tokens request_max_num_generation_tokens request_params_n "
    "request_params_max_tokens time_to_first_token_seconds inter_token_latency_seconds "
    "request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds "
    "request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_prefill_kv_computed_tokens cache_config_info engine_sleep_state corrupted_requests "
    "gpu_cache_usage_perc gpu_prefix_cache_queries gpu_prefix_cache_hits spec_decode_num_drafts "
    "spec_decode_num_accepted_tokens"
)


SERVER_SETTINGS = {"template": TEMPLATE}


def test_small_endpoints(server: LiveServer) -> None:
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("GET", "/health"), ("GET", "/ready")):
        assert server.raw(method, path)[0] == 200
    for path, answer in (
        ("/load", {"server_load": 0}),
        ("/is_sleeping", {"is_sleeping": False}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
    ):
        status, _, body = server.raw("GET", path)
        assert (status, json.loads(body)) == (200, answer)
    status, _, body = server.raw("GET", "/server_info")
    assert status == 200 and json.loads(body)["vllm_config"]["model"] == "tiny"


def test_thoughts_stand_under_both_names(server: LiveServer) -> None:
    eos = server.tokenizer.eos_token_id
    server.engine.answer = [*server.tokenizer.encode("<think>Hm.</think>Yes", add_special_tokens=False), eos]
    status, answer = server.chat(max_tokens=50)
    assert status == 200, answer
    message = answer["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Hm." and message["content"] == "Yes"
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=50, stream=True
        )
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "Hm."
    # The marks are plain text here, so special tokens are left out as they always are.
    special = server.tokenizer.convert_tokens_to_ids("<|im_start|>")
    server.engine.answer = [*server.engine.answer[:-1], special, eos]
    assert server.chat(max_tokens=50)[1]["choices"][0]["message"]["content"] == "Yes"


def test_a_batch_of_conversations_has_a_choice_for_each(server: LiveServer) -> None:
    talks = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    status, answer = server.post("/v1/chat/completions/batch", messages=talks, max_tokens=3, temperature=0)
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 6
    prompts = [server.tokenizer.decode(r.prompt_token_ids) for r in server.engine.requests[-2:]]
    assert sorted(prompts) == ["user:one\n", "user:two\n"]
    for body, param in (({"stream": True}, "stream"), ({"n": 2}, "n"), ({"messages": []}, "messages")):
        status, answer = server.post("/v1/chat/completions/batch", **{"messages": talks, **body})
        assert status == 400 and answer["error"]["param"] == param
    status, answer = server.post("/v1/chat/completions/batch", messages=[talks[0], []], max_tokens=3)
    assert status == 400


def test_render_gives_the_tokens_that_the_engine_would_get(server: LiveServer) -> None:
    talk = [{"role": "user", "content": "one"}]
    status, chat = server.post("/v1/chat/completions/render", messages=talk, stream=True, max_tokens=3)
    assert status == 200, chat
    assert server.tokenizer.decode(chat["token_ids"]) == "user:one\n" and chat["model"] == "tiny"
    assert chat["request_id"].startswith("chatcmpl-")
    before = len(server.engine.requests)
    status, texts = server.post("/v1/completions/render", prompt=["one", "two"])
    assert status == 200 and [len(one) for one in texts] == [3, 3]
    assert len(server.engine.requests) == before
    server.post("/v1/completions", prompt=["one", "two"], max_tokens=1)
    ran = sorted(request.prompt_token_ids for request in server.engine.requests[before:])
    assert sorted(one["token_ids"] for one in texts) == ran
    status, answer = server.post("/v1/chat/completions/render", model="other", messages=talk)
    assert status == 404 and "error" in answer
    status, answer = server.post("/v1/chat/completions/render", messages=[])
    assert status == 400 and answer["error"]["param"] == "messages"


def test_metric_names(server: LiveServer) -> None:
    server.chat(max_tokens=2)
    _, _, page = server.raw("GET", "/metrics")
    found = {family.name for family in text_string_to_metric_families(page.decode())}
    assert {f"vllm:{name}" for name in NAMES.split()} <= found


def test_generate_of_the_plain_server(server: LiveServer) -> None:
    _, whole = server.post("/v1/completions", prompt="one two", max_tokens=4, temperature=0)
    status, found = server.post("/generate", prompt="one two", max_tokens=4, temperature=0.0, n=2)
    assert (status, found) == (200, {"text": ["one two" + whole["choices"][0]["text"]] * 2})
    asked = {"prompt": "one two", "max_tokens": 4, "temperature": 0, "stream": True}
    status, headers, streamed = server.raw("POST", "/generate", json.dumps(asked).encode())
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line)["text"][0] for line in streamed.splitlines()]
    assert lines[-1] == found["text"][0] and len(lines) > 1
    assert all(later.startswith(line) for line, later in itertools.pairwise(lines))
    status, found = server.post("/generate", prompt=["a", "b"])
    assert status == 400 and found["error"]["param"] == "prompt"


def test_token_ids_in_and_out(server: LiveServer) -> None:
    ids = server.tokenizer.encode("one two")
    _, whole = server.post(
        "/v1/completions", prompt=ids, max_tokens=4, temperature=0, return_token_ids=True, logprobs=1
    )
    sampling = {"max_tokens": 4, "temperature": 0, "detokenize": False, "logprobs": 1, "n": 2}
    asked = {"token_ids": ids, "sampling_params": sampling, "request_id": "mine"}
    status, found = server.post("/inference/v1/generate", **asked)
    assert status == 200 and found["request_id"] == "mine"
    wanted = whole["choices"][0]
    for choice in found["choices"]:
        assert choice["token_ids"] == wanted["token_ids"]
        assert choice["finish_reason"] == wanted["finish_reason"] == "length"
        named = [f"token_id:{i}" for i in wanted["token_ids"]]
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == named
    events = server.events("/inference/v1/generate", **asked)
    first = [i for event in events for c in event["choices"] if not c["index"] for i in c["token_ids"]]
    assert first == wanted["token_ids"]
    for body, param in (
        ({"token_ids": [1], "sampling_params": {"max_tokens": "x"}}, "sampling_params.max_tokens"),
        ({"token_ids": []}, "prompt"),
        ({"token_ids": [1], "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"token_ids": [1], "features": {"a": 1}}, "features"),
    ):
        status, found = server.post("/inference/v1/generate", **body)
        assert status == 400 and found["error"]["param"] == param, found
