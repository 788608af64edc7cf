"""What people write never reaches the log, whatever goes wrong and however loud the log is."""

from __future__ import annotations

import logging

from nybble.engine.metrics import StepStats

CANARY, KEY = "canary-4f1c", "sesame-77aa"


def test_no_text_and_no_key_in_the_log(serve, caplog, dead):
    caplog.set_level(logging.DEBUG)
    faults = [{}, {1: ValueError(CANARY)}, {1: dead}, {0: RuntimeError(CANARY)}]
    for fault in faults:
        live = serve(at=fault, text=f"xx{CANARY}", args={"api_keys": (KEY,), "enable_log_requests": True})
        live.http.headers["authorization"] = f"Bearer {KEY}"
        for stream in (False, True):
            message = {"role": "user", "content": CANARY}
            live.post(
                "/v1/chat/completions", messages=[message], stream=stream, max_tokens=20, **{CANARY: CANARY}
            )
            live.post("/v1/completions", prompt=CANARY, stream=stream, stop=CANARY, user=CANARY)
        for body in (
            {"prompt": [CANARY, 3, {}]},
            {"prompt": "x", "stop": [CANARY * 200]},
            {"n": CANARY},
            {"prompt": CANARY, "model": CANARY},
            {"messages": [{"role": CANARY}]},
        ):
            live.post("/v1/completions", **body)
            live.post("/v1/chat/completions", **body)
        live.post("/tokenize", prompt=CANARY)
        live.http.post("/v1/completions", content=f'{{"{CANARY}'.encode())
        live.http.get(f"/v1/models?q={CANARY}")
        live.http.get(
            "/v1/models", headers={"authorization": f"Bearer {CANARY}", "x-request-id": f"{CANARY}!"}
        )
    lines = [
        f"{record.getMessage()} {record.exc_text or ''}"
        for record in caplog.records
        if "nybble" in record.name
    ]
    assert len(lines) > 40 and any("internal" in line or "ValueError" in line for line in lines)
    assert not [line for line in lines if CANARY in line or KEY in line]
    assert not [
        r for r in caplog.records if r.name.startswith(("uvicorn", "asyncio")) and r.levelno >= logging.ERROR
    ]


def test_a_path_cannot_forge_log_lines(server, caplog):
    caplog.set_level(logging.INFO, "nybble")
    server.http.get("/v1/%0aERROR%20forged%1b[31m")
    server.until(lambda: any("forged" in r.getMessage() for r in caplog.records))
    [line] = [r.getMessage() for r in caplog.records if "forged" in r.getMessage() and "nybble" in r.name]
    assert "\n" not in line and "\x1b" not in line


def test_the_access_log_can_be_left_out(serve, caplog):
    caplog.set_level(logging.INFO, "nybble")
    serve(args={"disable_access_log": True}).http.get("/v1/models")
    assert not [r for r in caplog.records if "/v1/models" in r.getMessage()]


def test_requests_are_logged_when_asked_for(serve, caplog):
    caplog.set_level(logging.INFO, "nybble")
    for on in (False, True):
        live = serve(args={"enable_log_requests": on})
        live.post("/v1/completions", prompt="abc", max_tokens=3, temperature=0.5, request_id=f"asked-{on}")
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("request ")]
    assert "asked-True" in line and "3 prompt tokens, n=1 max_tokens=3 temperature=0.5 top_p=1" in line


def test_metrics_count_and_name_no_one(server):
    server.post("/v1/completions", prompt=CANARY, n=2, stream=True)
    for listener in server.engine.listeners:
        listener(
            StepStats(
                num_running=3,
                num_waiting=2,
                kv_usage=0.5,
                prompt_tokens=7,
                generated_tokens=5,
                num_preempted=1,
                prefix_queries=8,
                prefix_hits=4,
            )
        )
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain") and CANARY not in response.text
    label = 'model_name="fake"'
    for name, value in {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.5,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 5,
        "num_preemptions_total": 1,
        "prefix_cache_queries_total": 8,
        "prefix_cache_hits_total": 4,
        "time_to_first_token_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "inter_token_latency_seconds_count": 11,
    }.items():
        assert f"nybble:{name}{{{label}}} {float(value)}\n" in response.text, name
    assert f'nybble:request_success_total{{finished_reason="stop",{label}}} 2.0\n' in response.text
