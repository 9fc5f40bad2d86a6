"""What a server answers, wherever it runs."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from contract_backends import CHAT, COMPLETIONS, FIXED_IDS, NAME, QUESTION, Backend, Server, wait_for

PROOF = {"prompt": FIXED_IDS, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}


def events(server: Server, body: dict[str, object]) -> list[str]:
    lines = server.post(CHAT, {**QUESTION, "stream": True, **body}).text.split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line]


def logprobs(server: Server) -> list[float]:
    entries = server.post(COMPLETIONS, PROOF).json()["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], FIXED_IDS[1:], strict=True)]


def gauge(server: Server) -> dict[str, float]:
    lines = [
        line
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("vllm:engine_sleep_state{")
    ]
    return {line.split('sleep_state="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def minor(server: Server) -> int:
    return int(server.get("/version").json()["version"].split(".")[1])


def test_health_and_ping_are_empty_200s(server: Server) -> None:
    assert [server.get(path).status_code for path in ("/health", "/ping")] == [200, 200]
    assert server.get("/health").content == b""
    assert server.get("/health").headers["server"] == "uvicorn"


def test_the_model_list_names_the_served_model_and_its_length(server: Server) -> None:
    (entry,) = server.get("/v1/models").json()["data"]
    assert entry["id"] == NAME
    assert entry["max_model_len"] > 0


def test_an_unknown_path_and_a_wrong_method_have_the_routing_shape(server: Server) -> None:
    assert (server.get("/nope").status_code, server.get("/nope").json()) == (404, {"detail": "Not Found"})
    assert (server.get("/sleep").status_code, server.get("/sleep").json()) == (
        405,
        {"detail": "Method Not Allowed"},
    )


def test_an_unknown_model_is_a_404_that_names_it(server: Server) -> None:
    answer = server.post(CHAT, {**QUESTION, "model": "nope"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (404, "NotFoundError")
    assert "`nope` does not exist" in error["message"]


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"messages": []}, {"temperature": -5}])
def test_bad_values_are_400s_in_vllms_shape(server: Server, changes: dict[str, object]) -> None:
    answer = server.post(CHAT, {**QUESTION, **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == 400


def test_a_picture_for_a_model_that_reads_text_alone_is_a_400(server: Server) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [{"type": "text", "text": "What is it?"}, picture]
    answer = server.post(CHAT, {**QUESTION, "messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"{NAME} is not a multimodal model",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


def test_a_body_that_is_no_json_is_a_400(server: Server) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        f"http://127.0.0.1:{server.port}{CHAT}", content=b'{"mess', headers=headers, timeout=30
    )
    assert answer.status_code == 400


def test_a_stream_is_role_then_text_then_finish_then_usage_then_done(server: Server) -> None:
    found = events(server, {"stream_options": {"include_usage": True}})
    assert found[-1] == "[DONE]"
    chunks = [json.loads(event) for event in found[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert finishes[-1] in ("length", "stop")
    assert set(finishes[:-1]) == {None}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_continuous_usage_counts_up_on_every_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [json.loads(event) for event in events(server, {"stream_options": options})[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_a_request_id_of_the_caller_becomes_the_answers_id(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    answer = httpx.post(url, json=QUESTION, headers={"X-Request-Id": "panel-1"}, timeout=60)
    assert answer.json()["id"] == "chatcmpl-panel-1"


def test_the_same_question_at_temperature_0_has_the_same_answer(server: Server) -> None:
    first, second = (server.post(CHAT, QUESTION).json()["choices"][0]["message"] for _ in range(2))
    assert first == second


def test_sleep_level_1_and_wake_say_so_everywhere(server: Server) -> None:
    slept = server.post("/sleep?level=1")
    assert slept.status_code == 200
    assert server.is_sleeping()
    assert server.get("/health").status_code == 200
    assert gauge(server) == {"awake": 0.0, "weights_offloaded": 1.0, "discard_all": 0.0}
    woken = server.post("/wake_up")
    assert not server.is_sleeping()
    assert gauge(server)["awake"] == 1.0
    if minor(server) >= 32:
        assert slept.json() == {"status": "sleeping", "level": 1}
        assert woken.json() == {"status": "awake", "tags": None}


def test_a_chat_with_a_sleeper_hangs_and_leaves_no_trace(server: Server) -> None:
    server.post("/sleep?level=1")
    with pytest.raises(httpx.ReadTimeout):
        server.post(CHAT, QUESTION, timeout=0.7)
    assert "vllm:num_requests_running" in server.get("/metrics").text
    server.post("/wake_up")
    assert server.post(CHAT, QUESTION).status_code == 200


def test_a_held_chat_completes_after_the_wake(server: Server) -> None:
    server.post("/sleep?level=1")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.post, CHAT, QUESTION)
        with pytest.raises(TimeoutError):
            held.result(timeout=0.5)
        server.post("/wake_up")
        assert held.result(timeout=30).status_code == 200


def test_a_stream_to_a_sleeper_gets_its_head_and_then_silence(server: Server) -> None:
    server.post("/sleep?level=1")
    body = {**QUESTION, "stream": True}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60))
        answer = stack.enter_context(
            client.stream("POST", f"http://127.0.0.1:{server.port}{CHAT}", json=body)
        )
        assert answer.status_code == 200
        answer.request.extensions["timeout"]["read"] = 1.0  # from now on: the head may take its time
        with pytest.raises(httpx.ReadTimeout):
            next(answer.iter_bytes())
    server.post("/wake_up")
    wait_for(lambda: not server.is_sleeping())


@pytest.mark.parametrize("tags", ["tags=bogus", "tags=weights,kv_cache"])
def test_an_unknown_tag_is_a_200_that_wakes_nothing(server: Server, tags: str) -> None:
    server.post("/sleep?level=1")
    assert server.post(f"/wake_up?{tags}").status_code == 200
    assert server.is_sleeping()
    server.post("/wake_up")
    assert not server.is_sleeping()


def test_one_tag_leaves_it_asleep_and_the_other_ends_that(server: Server) -> None:
    server.post("/sleep?level=1")
    server.post("/wake_up?tags=weights")
    assert server.is_sleeping()
    server.post("/wake_up?tags=kv_cache")
    assert not server.is_sleeping()


def test_two_tags_in_one_call_wake_all(server: Server) -> None:
    server.post("/sleep?level=1")
    server.post("/wake_up?tags=weights&tags=kv_cache")
    assert not server.is_sleeping()


def test_a_second_sleep_changes_the_gauge_and_not_the_level(server: Server) -> None:
    server.post("/sleep?level=1")
    assert server.post("/sleep?level=2").status_code == 200
    assert gauge(server)["discard_all"] == 1.0
    server.post("/wake_up")
    assert server.post(CHAT, QUESTION).json()["choices"][0]["message"]["content"].strip("!") != ""


def test_a_body_does_not_set_the_level(server: Server) -> None:
    server.post("/sleep", {"level": 2})
    assert gauge(server)["weights_offloaded"] == 1.0
    server.post("/wake_up")


def test_log_probabilities_are_the_same_after_sleep_and_wake(server: Server) -> None:
    before = logprobs(server)
    server.post("/sleep?level=1")
    server.post("/wake_up")
    assert logprobs(server) == pytest.approx(before, abs=0.05)


def test_level_2_with_a_reload_gives_the_same_log_probabilities(server: Server) -> None:
    before = logprobs(server)
    steps = [
        server.post("/sleep?level=2"),
        server.post("/wake_up?tags=weights"),
        server.post("/collective_rpc", {"method": "reload_weights"}),
        server.post("/wake_up?tags=kv_cache"),
        server.post("/reset_prefix_cache"),
    ]
    assert [step.status_code for step in steps] == [200] * 5
    assert steps[2].json() == {"results": [None]}
    assert not server.is_sleeping()
    assert logprobs(server) == pytest.approx(before, abs=0.05)


def test_level_2_without_a_reload_is_garbage_until_one(server: Server) -> None:
    if not server.backend.frees_memory:
        pytest.skip("vLLM on the CPU keeps its weights.")
    before = logprobs(server)
    server.post("/sleep?level=2")
    assert server.post("/wake_up").status_code == 200
    assert logprobs(server) != pytest.approx(before, abs=0.05)
    server.post("/collective_rpc", {"method": "reload_weights"})
    assert logprobs(server) == pytest.approx(before, abs=0.05)


def test_a_pause_counts_as_sleep_until_resume(server: Server) -> None:
    assert server.post("/pause").status_code == 200
    assert server.is_sleeping()
    assert server.get("/is_paused").json() == {"is_paused": True}
    server.post("/resume")
    assert not server.is_sleeping()


def test_sleep_ends_a_running_stream_with_an_abort(server: Server) -> None:
    body = {**QUESTION, "max_tokens": server.backend.endless_tokens, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.post("/sleep?level=1")
        rest = [line for line in lines if line]
    server.post("/wake_up")
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert reasons[-1] == "abort"


def test_an_unknown_method_is_a_500_that_the_engine_survives(server: Server) -> None:
    answer = server.post("/collective_rpc", {"method": "no_such_method"})
    assert answer.status_code == 500
    assert "Call to collective_rpc method failed" in answer.json()["error"]["message"]
    assert server.post(CHAT, QUESTION).status_code == 200


def load(server: Server) -> int:
    return int(server.get("/load").json()["server_load"])


def test_a_stream_to_a_sleeper_whose_client_leaves_is_forgotten(server: Server) -> None:
    server.post("/sleep?level=1")
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    body = {**QUESTION, "stream": True}
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body):
        wait_for(lambda: load(server) == 1)
    wait_for(lambda: load(server) == 0)
    server.post("/wake_up")


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {**QUESTION, "max_tokens": server.backend.endless_tokens, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as answer:
        next(answer.iter_lines())

    def idle() -> bool:
        lines = server.get("/metrics").text.splitlines()
        return any(line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0") for line in lines)

    wait_for(idle)


def test_a_paused_server_gives_up_its_kv_cache_alone_and_a_wake_brings_it_back(
    server: Server, backend: Backend
) -> None:
    release = "/release_kv_cache_memory"
    if minor(server) < 31:
        assert server.post(release).status_code == 404
        return
    assert server.post(release).status_code == 500  # it is not paused
    if backend.name == "cpu":
        return  # its workers have nothing to give up, and vLLM answers 500 there (0.32)
    assert server.post("/sleep?level=0").status_code == 200
    released = server.post(release)
    assert (released.status_code, released.json()) == (200, {"status": "kv_cache_released"})
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    assert server.post(release).status_code == 500  # it is gone already
    assert server.post("/sleep?level=1").status_code == 200  # the weights follow, without a wake
    assert server.post("/wake_up").status_code == 200
    assert server.get("/is_sleeping").json() == {"is_sleeping": False}
    assert len(logprobs(server)) == len(FIXED_IDS) - 1
