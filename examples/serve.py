"""A server with the OpenAI route for images. Requests that come at any time share calls of the model (``Engine``), each
with caches of its own.

    pip install 'toca-compile[serve]'
    python examples/serve.py                                # on this machine alone: http://127.0.0.1:8000
    curl -s localhost:8000/v1/images/generations -d '{"prompt": "sneaker"}' -H 'content-type: application/json'

The model is the small trained one of examples/fashion_dit; of your own, ``Studio`` is all that knows it. SIGTERM: no
more requests are taken, those that were are answered.
"""

import argparse
import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import toca_compile
from toca_compile.demo import fashion_dit
from toca_compile.serving.requests import Scheduled, Ticket


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait: a request beyond is told so, and may come again."""

    pictures: int = 8
    steps: int = 100
    queue: int = 64


class Studio:
    """The model: what its prompts and sizes are, and its pictures."""

    size = "28x28"

    def __init__(self) -> None:
        self.model, self._scheduler = fashion_dit.load(fashion_dit.default_model())
        self._sampler = Scheduled(self._scheduler, step={"eta": 0.0})
        self._classes = {name.lower(): i for i, name in enumerate(fashion_dit.CLASSES)}
        self.prompts = ", ".join(fashion_dit.CLASSES)

    def request(self, prompt: str, steps: int, guidance: float, seed: int) -> toca_compile.Request | None:
        """A sampling; None where the prompt is none that the model knows."""
        label = self._classes.get(prompt.strip().lower())
        if label is None:
            return None
        side, channels = self.model.config.sample_size, self.model.config.in_channels
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
        none = torch.tensor([self.model.config.num_embeds_ada_norm])
        return toca_compile.Request(
            noise, {"class_labels": torch.tensor([label])}, steps, guidance, {"class_labels": none}, seed, self._sampler
        )

    def png(self, sample: torch.Tensor) -> str:
        """A sample as the base64 of a PNG."""
        from PIL import Image

        grey = ((sample[0, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(grey, "L").save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()


class Asked(BaseModel):
    """The body of a request. What OpenAI's route does not have is named as in diffusers."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=1000)
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: str = "b64_json"
    stream: bool = False
    model: str | None = None
    user: str | None = None
    seed: int = Field(0, ge=0, lt=2**63 - 1000)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(1.5, ge=0, le=100)


class Refused(Exception):
    """An answer that is an error: what to say, and which field is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        self.status, self.message, self.param = status, message, param


class Metrics:
    """What Prometheus reads."""

    def __init__(self, engine: toca_compile.Engine) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("toca_answers", "answers by status", ["status"], **given)
        self.seconds = Histogram("toca_seconds", "from a request to its picture", **given)
        told = {"toca_pending": lambda: engine.pending, "toca_cache_bytes": lambda: engine.cache_bytes}
        for name, read in told.items():
            Gauge(name, f"of the engine: {name.removeprefix('toca_')}", **given).set_function(read)
        for name in vars(engine.statistics):
            gauge = Gauge(f"toca_engine_{name}", f"of the engine, so far: {name}", **given)
            gauge.set_function(lambda name=name: getattr(engine.statistics, name))


def application(engine: toca_compile.Engine, studio: Studio, limits: Limits) -> FastAPI:
    """The server's routes."""
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield
        # Here all that was taken is done.

    app = FastAPI(title="toca_compile", lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        kind = "invalid_request_error" if error.status < 429 else "server_error"
        metrics.answers.labels(error.status).inc()
        body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": None}}
        return JSONResponse(body, error.status, {"retry-after": "1"} if error.status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        return await refused(request, Refused(400, f"{where or 'the body'}: {first['msg']}", where))

    def tickets(asked: Asked) -> list[Ticket]:
        """Take a request, or say why not."""
        if asked.n > limits.pictures:
            raise Refused(400, f"n is at most {limits.pictures}, not {asked.n}", "n")
        if asked.num_inference_steps > limits.steps:
            raise Refused(400, f"num_inference_steps is at most {limits.steps}", "num_inference_steps")
        if asked.size not in ("auto", studio.size):
            raise Refused(400, f"size is {studio.size}, which 'auto' is too, not {asked.size!r}", "size")
        if asked.response_format != "b64_json":
            raise Refused(400, "response_format is b64_json: no picture is kept to give a url to", "response_format")
        steps, guidance = asked.num_inference_steps, asked.guidance_scale
        requests = [studio.request(asked.prompt, steps, guidance, asked.seed + i) for i in range(asked.n)]
        known = [request for request in requests if request is not None]
        if len(known) < len(requests):
            raise Refused(400, f"the model knows no {asked.prompt!r}, but: {studio.prompts}", "prompt")
        if engine.pending + asked.n > limits.queue:
            raise Refused(429, f"{engine.pending} pictures are waiting, and at most {limits.queue} may: come again")
        try:
            return [engine.submit(request) for request in known]
        except toca_compile.TocaError as error:
            raise Refused(503, str(error)) from error

    @app.post("/v1/images/generations")
    async def generations(asked: Asked, request: Request) -> Response:
        began, taken = time.time(), tickets(asked)
        if asked.stream:
            return StreamingResponse(progress(taken, asked, began), media_type="text/event-stream")
        try:
            samples = await finished(taken, request)
        except (asyncio.CancelledError, ConnectionError):
            raise Refused(499, "the client is gone") from None
        except Exception as error:
            raise Refused(500, f"{type(error).__name__}: {error}") from error
        metrics.answers.labels(200).inc()
        metrics.seconds.observe(time.time() - began)
        return JSONResponse({"created": int(began), "data": [{"b64_json": studio.png(x)} for x in samples]})

    async def finished(taken: list[Ticket], request: Request) -> list[torch.Tensor]:
        """The samples; of a client that is gone nothing is computed."""
        every = asyncio.gather(*map(asyncio.wrap_future, taken))
        while not every.done():
            await asyncio.wait([every], timeout=0.5)
            if not every.done() and await request.is_disconnected():
                every.cancel()
                raise ConnectionError
        return await every

    async def progress(taken: list[Ticket], asked: Asked, began: float) -> AsyncIterator[str]:
        """Server-sent events: how many steps are done, then the pictures."""
        told = None
        try:
            while not all(ticket.done() for ticket in taken):
                steps = [ticket.steps for ticket in taken]
                if steps != told:
                    told = steps
                    yield event("image_generation.progress", steps=steps, of=asked.num_inference_steps)
                await asyncio.sleep(0.02)
            for i, ticket in enumerate(taken):
                error = ticket.exception()
                if error is not None:
                    metrics.answers.labels(500).inc()
                    yield event("error", message=f"{type(error).__name__}: {error}")
                    return
                yield event("image_generation.completed", index=i, b64_json=studio.png(ticket.result()))
            metrics.answers.labels(200).inc()
            metrics.seconds.observe(time.time() - began)
        finally:
            for ticket in taken:  # the client may be gone
                ticket.cancel()

    @app.get("/metrics")
    async def read() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    async def health() -> dict[str, int]:
        return {"pending": engine.pending}

    return app


def event(kind: str, **fields: Any) -> str:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="an address that others reach needs a proxy in front")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--policy", default="balanced", help="a level or a preset")
    parser.add_argument("--lowering", default="inductor", choices=("inductor", "eager"))
    parser.add_argument(
        "--memory", type=int, default=2 << 30, metavar="BYTES", help="for caches; beyond, requests wait"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="of batches")
    parser.add_argument("--warm-up", type=int, nargs="*", default=[50], metavar="STEPS", help="compile for these first")
    parser.add_argument("--queue", type=int, default=Limits.queue, help="pictures that may wait")
    given = parser.parse_args()
    studio = Studio()
    engine = toca_compile.Engine(
        studio.model, given.policy, memory=given.memory, sizes=given.sizes, lowering=given.lowering
    )
    first = studio.request("bag", 50, 1.5, 0)
    if given.warm_up and first is not None:
        engine.warm_up(first, steps=given.warm_up)
    app = application(engine, studio, Limits(queue=given.queue))
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning", timeout_graceful_shutdown=600)


if __name__ == "__main__":
    main()
