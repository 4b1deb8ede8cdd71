"""The example of a server: many clients at once, none of whom is lost, and what it says to those at fault."""

import base64
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

for _name in ("fastapi", "uvicorn", "prometheus_client", "diffusers"):
    pytest.importorskip(_name)

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process, self.port = process, port

    def call(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of an answer."""
        data = None if body is None else json.dumps(body).encode()
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def pictures(self, **asked: Any) -> tuple[int, Any]:
        """What the OpenAI route says."""
        status, text = self.call("/v1/images/generations", {"prompt": "bag", "num_inference_steps": 6, **asked})
        return status, json.loads(text)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/serve.py", "--port", str(port), "--lowering", "eager", "--sizes", "1", "2"]
    process = subprocess.Popen([*command, "--warm-up", "6", "--queue", "12"], cwd=ROOT)
    try:
        found = Server(process, port)
        for _ in range(600):
            with suppress(OSError):
                if found.call("/healthz")[0] == 200:
                    break
            assert process.poll() is None
            time.sleep(0.2)
        yield found
    finally:
        process.kill()
        process.wait()


def test_many_clients_at_once_are_all_answered(server: Server) -> None:
    answers: dict[int, Any] = {}

    def client(number: int) -> None:
        for i in range(4):
            while True:
                status, body = server.pictures(seed=10 * number + i, num_inference_steps=5 + i)
                if status != 429:  # full: come again
                    break
                time.sleep(0.05)
            answers[10 * number + i] = status, body

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(answers) == 24
    assert {status for status, _ in answers.values()} == {200}
    pictures = [base64.b64decode(body["data"][0]["b64_json"]) for _, body in answers.values()]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 24
    # The same alone as in the crowd.
    _, body = server.pictures(seed=31, num_inference_steps=6)
    assert body["data"] == answers[31][1]["data"]
    text = server.call("/metrics")[1]
    assert "toca_pending 0.0" in text
    told = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("toca_engine_")}
    assert told["toca_engine_done"] >= 25
    assert told["toca_engine_samples"] > told["toca_engine_calls"]


def test_a_stream_tells_the_steps(server: Server) -> None:
    status, text = server.call(
        "/v1/images/generations", {"prompt": "boot", "num_inference_steps": 8, "n": 2, "stream": True}
    )
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [e["index"] for e in events if e["type"] == "image_generation.completed"] == [0, 1]
    steps = [e["steps"] for e in events if e["type"] == "image_generation.progress"]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({"prompt": "a cat"}, 400, "the model knows no 'a cat', but: T-shirt"),
        ({"n": 9}, 400, "n is at most 8"),
        ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
        ({"num_inference_steps": 101}, 400, "num_inference_steps is at most 100"),
        ({"size": "1024x1024"}, 400, "size is 28x28"),
        ({"response_format": "url"}, 400, "response_format is b64_json"),
        ({"quality": "hd"}, 400, "quality: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_done_is_said(server: Server, asked: Any, status: int, message: str) -> None:
    found, body = server.pictures(**asked)
    assert found == status
    assert message in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


def test_on_sigterm_it_answers_those_that_it_took(server: Server) -> None:
    """The last test of the server, which it ends."""
    answers: list[int] = []
    clients = [
        threading.Thread(target=lambda: answers.append(server.pictures(num_inference_steps=40)[0])) for _ in range(4)
    ]
    for thread in clients:
        thread.start()
    while json.loads(server.call("/healthz")[1])["pending"] < 4 and not answers:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join()
    assert answers == [200] * 4
    server.process.wait(timeout=60)
