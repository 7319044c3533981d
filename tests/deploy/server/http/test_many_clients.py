"""Many clients on a real engine: equal answers, cancellations, fairness, a full queue, metrics."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest

from deploy.server.http.cancellations import cancel_at_random, check_after
from deploy.server.reference import alone, pictures_of, text_of
from deploy.server.requests import (
    CHAT,
    COMPLETIONS,
    chat,
    check_error,
    content,
    events_of,
    long_text,
    many_pictures,
    picture,
    reply_of,
    rgb_of_url,
)
from deploy.server.scripted_engine import Script
from deploy.server.server_process import (
    SCRIPTED_ENGINE,
    ServerProcess,
    request_bytes,
    wait_until,
)
from mmi_deploy.documents.document import Document, Draw, Image, Text

pytestmark = pytest.mark.timing

WORDS = "the red square moves down."


def answer(server: ServerProcess, body: dict[str, Any]) -> tuple[str, list[np.ndarray]]:
    reply = server.post(CHAT, body)
    assert reply.status_code == 200, reply.text
    message = reply.json()["choices"][0]["message"]
    return message["content"], [rgb_of_url(one["image_url"]["url"]) for one in message["images"]]


def check_equal(found: tuple[str, list[np.ndarray]], other: tuple[str, list[np.ndarray]]) -> None:
    assert found[0] == other[0]
    assert len(found[1]) == len(other[1])
    for one, two in zip(found[1], other[1], strict=True):
        np.testing.assert_array_equal(one, two)


def expected(bundle: Path, *parts: Any, **options: Any) -> tuple[str, list[np.ndarray]]:
    document = Document(
        tuple(
            Draw() if part is None else Text(part) if isinstance(part, str) else Image(part)
            for part in parts
        )
    )
    found, _ = alone(bundle, document, **options)
    return text_of(found), pictures_of(found)


@pytest.mark.parametrize("schedule", [None, "unipc:20"])
def test_eight_at_once_are_what_each_is_alone(
    server: ServerProcess, bundle: Path, schedule: str | None
) -> None:
    """Text and pixels, with other guidance and other samplers beside them."""

    def one(seed: int) -> None:
        guidance = (1.0, 3.5, 7.0)[seed % 3]
        used = schedule if seed % 2 else None
        parts = (picture(seed), WORDS, None) if seed % 2 else (WORDS,)
        mmi = {"guidance": guidance, **({"schedule": used} if used else {})}
        body = chat(*parts, tokens=12, images=1, seed=seed, mmi=mmi)
        options = {"seed": seed, "max_tokens": 12, "max_images": 1, "guidance": guidance}
        found = answer(server, body)
        wanted = expected(bundle, *parts, schedule=used, **options)
        check_equal(found, wanted)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))


def test_one_text_with_two_pictures_by_turns(server: ServerProcess, bundle: Path) -> None:
    """An answer belongs to its own picture, whatever prefix a slot still has."""
    options = {"seed": 3, "max_tokens": 12, "max_images": 1}
    wanted = [expected(bundle, picture(one), WORDS, **options) for one in (1, 2)]
    with ThreadPoolExecutor(8) as threads:
        bodies = [chat(picture(1 + i % 2), WORDS, tokens=12, images=1, seed=3) for i in range(8)]
        for number, found in enumerate(threads.map(lambda body: answer(server, body), bodies)):
            check_equal(found, wanted[number % 2])


def test_a_second_turn_with_one_more_picture_reuses_all_of_the_first(
    server: ServerProcess,
) -> None:
    parts = (picture(11), "the blue circle moves up.")
    first = server.post(CHAT, chat(*parts, tokens=4, ignore_eos=True)).json()
    before = server.metrics()
    reply = first["choices"][0]["message"]
    body = chat(tokens=4)
    body["messages"] = [
        {"role": "user", "content": content(*parts)},
        {"role": "assistant", "content": reply["content"], "images": reply["images"]},
        {"role": "user", "content": content(picture(12))},
    ]
    usage = server.post(CHAT, body).json()["usage"]
    # The last token of a reply was sampled, and never read.
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
    encoded = 'mmi_stage_rows_total{engine="0",stage="encode"}'
    assert server.metrics()[encoded] - before[encoded] == 1


def test_callers_share_no_cache_unless_told(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key-of-one-caller\nkey-of-another-caller\n")
    cached: dict[bool, list[int]] = {}
    for share in (False, True):
        options = ("--key-file", file, "--slots", 2, *(("--share-cache",) if share else ()))
        with ServerProcess(bundle, *options) as started:
            for key in ("key-of-one-caller", "key-of-another-caller", "key-of-another-caller"):
                body = chat(WORDS + " " + WORDS + " " + WORDS, tokens=1)
                headers = {"authorization": f"Bearer {key}"}
                usage = started.post(CHAT, body, headers=headers).json()["usage"]
                found = usage["prompt_tokens_details"]["cached_tokens"]
                cached.setdefault(share, []).append(found)
    assert cached[False][:2] == [0, 0] and cached[False][2] > 0
    assert cached[True][0] == 0 and cached[True][1] > 0


def documents(server: ServerProcess) -> int:
    return int(server.get("/health").json()["documents"])


def idle(server: ServerProcess) -> bool:
    found = server.metrics()
    return not found['mmi_running{engine="0"}'] and not found['mmi_waiting{engine="0"}']


def test_a_client_that_leaves_a_picture_frees_its_slot_and_disturbs_nobody(
    server: ServerProcess, bundle: Path
) -> None:
    wanted = expected(bundle, WORDS, None, seed=5, max_tokens=1, max_images=0, schedule="unipc:20")
    neighbour = chat(WORDS, None, tokens=1, seed=5, mmi={"schedule": "unipc:20"})
    wait_until(lambda: idle(server))
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(answer, server, neighbour)
        body = chat(WORDS, None, images=0, stream=True, mmi={"progress": True})
        body["mmi"]["schedule"] = "unipc:20"
        with server.client() as client:
            request = client.build_request("POST", CHAT, json=body)
            response = client.send(request, stream=True)
            for event in events_of(response.iter_lines()):
                if event.get("mmi", {}).get("step") == 3:
                    break
            response.close()
        check_equal(beside.result(), wanted)
    wait_until(lambda: idle(server), 2)
    request_id = response.headers["x-request-id"]
    assert server.logged(request_id)["reason"] == "cancelled"
    rows = server.metrics()['mmi_stage_rows_total{engine="0",stage="denoise"}']
    time.sleep(0.2)
    assert server.metrics()['mmi_stage_rows_total{engine="0",stage="denoise"}'] == rows


def test_cancellations_at_random_points_leave_later_answers_right(
    server: ServerProcess, bundle: Path
) -> None:
    cancel_at_random(server, 120, seed=1)
    check_after(server, bundle, 6)
    wait_until(lambda: idle(server), 5)


def test_health_answers_while_pictures_are_drawn(server: ServerProcess) -> None:
    stop = Event()

    def draw(seed: int) -> None:
        with server.client() as client:
            with client.stream("POST", CHAT, json=many_pictures(seed=seed, stream=True)) as one:
                for _ in one.iter_lines():
                    if stop.is_set():
                        return

    threads = [Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: documents(server) == 8)
        took = []
        with server.client() as client:
            for _ in range(100):
                begun = time.perf_counter()
                assert client.get("/health/live").status_code == 200
                took.append(time.perf_counter() - begun)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # 50 ms at the 99th percentile on a machine of its own; here others may run beside it.
    assert sorted(took)[90] < 0.15
    assert statistics.median(took) < 0.05


def test_a_text_goes_on_while_pictures_are_drawn(server: ServerProcess) -> None:
    """Its gaps keep to the stated bound, and other guidance values wait for nobody."""
    stop = Event()
    steps: dict[int, list[float]] = {seed: [] for seed in range(3)}

    def draw(seed: int) -> None:
        body = many_pictures(seed=seed, stream=True)
        body["mmi"] |= {"guidance": 1.0 + seed, "progress": True}
        with server.client() as client:
            with client.stream("POST", CHAT, json=body) as one:
                for event in events_of(one.iter_lines()):
                    if event.get("mmi", {}).get("type") == "image.progress":
                        steps[seed].append(time.perf_counter())
                    if stop.is_set():
                        return

    threads = [Thread(target=draw, args=(seed,)) for seed in steps]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(map(len, steps.values())))
        times, counts = [], {seed: len(found) for seed, found in steps.items()}
        with server.client() as client:
            with client.stream("POST", CHAT, json=long_text(150, stream=True)) as one:
                times = [time.perf_counter() for _ in events_of(one.iter_lines())]
        drawn = [len(found) - counts[seed] for seed, found in steps.items()]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    bound = server.metrics()['mmi_text_gap_bound_seconds{engine="0"}']
    gaps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
    # The bound comes from runs measured at the start; others may use the machine since.
    assert gaps[int(0.95 * len(gaps))] < 3 * bound, (gaps[-5:], bound)
    assert min(drawn) > 0 and max(drawn) <= 3 * min(drawn) + 8, drawn


def test_arrivals_of_long_prompts_do_not_starve_a_running_text(server: ServerProcess) -> None:
    """Long prompts arrive as a Poisson process, a quarter of them with pictures."""
    wait_until(lambda: idle(server))
    draws = random.Random(3)
    stop, arrived = Event(), list[float]()
    prompt = " ".join([WORDS] * 12)

    def ask(number: int) -> None:
        parts = (picture(number), prompt) if number % 4 == 0 else (f"{number} {prompt}",)
        begun = time.perf_counter()
        reply = server.post(CHAT, chat(*parts, tokens=2, seed=number))
        assert reply.status_code == 200, reply.text
        arrived.append(time.perf_counter() - begun)

    def arrive(pool: ThreadPoolExecutor) -> None:
        for number in count():
            if stop.wait(draws.expovariate(8)):
                return
            pool.submit(ask, number)

    with ThreadPoolExecutor(32) as pool:
        arrivals = Thread(target=arrive, args=(pool,))
        arrivals.start()
        wait_until(lambda: len(arrived) > 2)
        gaps = list[float]()
        with server.client() as client:
            while len(arrived) <= 10:  # one text is over too soon on a fast machine
                with client.stream("POST", CHAT, json=long_text(400, stream=True)) as one:
                    times = [time.perf_counter() for _ in events_of(one.iter_lines())]
                gaps += [b - a for a, b in zip(times, times[1:], strict=False)]
        stop.set()
        arrivals.join()
    bound = server.metrics()['mmi_text_gap_bound_seconds{engine="0"}']
    gaps.sort()
    assert gaps[int(0.95 * len(gaps))] < 3 * bound, (gaps[-5:], bound)
    assert max(arrived) < 20, "every arrival has its turn"


def test_one_after_ready_is_as_fast_as_the_tenth(bundle: Path) -> None:
    took = []
    with ServerProcess(bundle, "--slots", 2) as started, started.client() as client:
        client.get("/health/ready")  # the connection
        for number in range(10):
            # The same rest before each: some virtual machines take memory away from idle ones.
            time.sleep(0.5)
            begun = time.perf_counter()
            reply = client.post(CHAT, json=chat(WORDS, None, tokens=4, seed=number))
            assert reply.status_code == 200
            took.append(time.perf_counter() - begun)
    # 1.2 on a quiet machine.
    assert took[0] < 2 * statistics.median(took), took


# The queue, with an engine whose documents hang.


@pytest.fixture(scope="module")
def short(bundle: Path) -> Iterator[ServerProcess]:
    """Four slots, and a queue of eight."""
    with ServerProcess(bundle, "--queue", 8, engine=SCRIPTED_ENGINE) as started:
        yield started


def test_beyond_the_queue_everybody_is_told_at_once(short: ServerProcess) -> None:
    body = json.dumps(chat(seed=Script.HANG)).encode()
    socks = [short.connect() for _ in range(12)]
    try:
        for sock in socks:
            sock.sendall(request_bytes(CHAT, body))
        wait_until(lambda: documents(short) == 12)
        took = []
        with short.client() as client:
            for stream in (True, False) * 100:
                begun = time.perf_counter()
                refused = client.post(CHAT, json=chat(seed=Script.HANG, stream=stream))
                took.append(time.perf_counter() - begun)
                assert check_error(refused, 429)["code"] == "queue_full"
        assert statistics.median(took) < 0.02
        assert short.metrics()['mmi_rejected_total{reason="queue_full"}'] >= 200
        # One that leaves frees its place.
        socks.pop().close()
        wait_until(lambda: documents(short) == 11, 2)
        assert short.post("/v1/images/generations", {"prompt": "the", "n": 2}).status_code == 429
        assert short.post(CHAT, chat(seed=Script.ANSWER)).status_code == 200
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: documents(short) == 0, 5)


def test_a_hundred_at_once_are_all_answered(short: ServerProcess) -> None:
    barrier = Barrier(40)

    def one(_: int) -> int:
        with short.client() as client:
            client.get("/health/live")
            barrier.wait()
            return client.post(CHAT, json=chat(seed=Script.SLOW)).status_code

    with ThreadPoolExecutor(40) as threads:
        codes = list(threads.map(one, range(40)))
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 12


def test_who_waits_too_long_is_told(bundle: Path) -> None:
    with ServerProcess(bundle, "--slots", 1, "--queue-seconds", 0.5) as started:
        with started.client() as client:
            with client.stream("POST", CHAT, json=many_pictures(stream=True)) as running:
                lines = running.iter_lines()  # it closes the stream when it is dropped
                next(lines)
                refused = started.post(CHAT, chat())
                assert check_error(refused, 503)["code"] == "queue_timeout"
                running.close()


# Metrics and logs.


def test_junk_makes_no_series(scripted: ServerProcess) -> None:
    def one(number: int) -> None:
        rng = random.Random(number)
        with scripted.client() as client:
            for _ in range(50):
                name = f"{rng.random()}"
                client.get(f"/v1/models/{name}")
                client.get(f"/{name}")
                client.get(f"/v1/mmi/images/{name}")
                client.post(CHAT, json={**chat(), "model": name})
                client.request("PUT", f"/v1/{name}", headers={"user-agent": name})

    one(0)
    scripted.metrics()
    before = set(scripted.metrics())
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(1, 5)))
    assert set(scripted.metrics()) == before


def test_metrics_count_what_happened(server: ServerProcess) -> None:
    before = server.metrics()
    reply = server.post(CHAT, chat(picture(31), WORDS, None, tokens=3, ignore_eos=True)).json()
    after = server.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    usage = reply["usage"]
    assert more('mmi_requests_total{code="200",endpoint="chat"}') == 1
    assert more('mmi_tokens_total{kind="written"}') == 3
    assert more('mmi_images_total{kind="drawn"}') == 1
    assert more('mmi_images_total{kind="given"}') == 1
    given = usage["prompt_tokens_details"]
    assert more('mmi_tokens_total{kind="prompt_text"}') == given["text_tokens"]
    assert more('mmi_tokens_total{kind="prompt_image"}') == given["image_tokens"]
    for name in ("queue_seconds", "time_to_first_token_seconds", "request_seconds"):
        assert more(f"mmi_{name}_count") == 1


def test_the_log_has_numbers_and_no_contents(server: ServerProcess) -> None:
    marker, number = "a-marker-that-nobody-else-sends", "log-test"
    rgb = picture(77)
    body = chat(
        rgb, WORDS, tokens=2, ignore_eos=True, stop=[marker], user=marker, metadata={"a": marker}
    )
    headers = {
        "x-request-id": number,
        "user-agent": marker,
        "authorization": f"Bearer {marker}",
        "cookie": marker,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    assert server.post(f"{CHAT}?key={marker}", body, headers=headers).status_code == 200
    bad = [{"role": "user", "content": marker}]
    server.post(CHAT, {**chat(), "messages": bad, "unknown": marker})
    server.post(COMPLETIONS, {"model": marker, "prompt": marker})
    server.get(f"/{marker}")
    server.post(CHAT, content=marker.encode(), headers={"content-type": "application/json"})
    line = server.logged(number)
    assert line["endpoint"] == "chat" and line["status"] == 200 and line["tokens"] == 2
    assert line["traceparent"] == headers["traceparent"]
    said = "".join(server.err + server.out)
    url = content(rgb)[0]["image_url"]["url"]
    for secret in (marker, WORDS, url[30:60]):
        assert secret not in said


def test_a_stream_from_many_clients_is_whole(server: ServerProcess) -> None:
    """Streamed and not streamed, the same."""

    def one(seed: int) -> None:
        body = chat(WORDS, tokens=10, images=1, seed=seed)
        response = server.post(CHAT, {**body, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
        text, pictures = reply_of(list(events_of(response.text.split("\n"))))
        check_equal((text, pictures), answer(server, body))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(one, range(40, 46)))
