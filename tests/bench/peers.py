"""Owns the baselines that run in processes of their own: the bare adapter, gpt4all's generate(), FastAPI + uvicorn.

``python -m tests.bench.peers adapter|gpt4all MODEL`` reads JSON requests from stdin, one a line, and answers each with
the seconds it took and the tokens it made; ``python -m tests.bench.peers fastapi PORT`` serves.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def _answer_lines(run: Any) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start_s = time.perf_counter()
        tokens = run(request["prompt"], request["max_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start_s, "tokens": tokens}), flush=True)


def adapter(model: str) -> None:
    """The project's adapter in a loop, without process, queue or HTTP."""
    from service.engine import gguf, gpt4all_adapter, host
    from service.engine.interface import GenerationRequest, Message, ModelSpec, Sampling

    with Path(model).open("rb") as file:
        header = gguf.read_header(file)
    threads = host.threads_for(header.weights_bytes)
    engine = gpt4all_adapter.load(ModelSpec(model, "x", "0" * 64, header, header.context_length, threads))

    def run(prompt: str, max_tokens: int) -> int:
        request = GenerationRequest((Message("user", prompt),), max_tokens, Sampling(temperature=0.0))
        done = engine.generate(request, lambda piece: None, lambda tokens: None, lambda: False)
        return done.completion_tokens

    _answer_lines(run)


def gpt4all(model: str) -> None:
    """gpt4all's own high-level call with its own defaults, the thread count and context length equal."""
    from gpt4all import GPT4All

    from service.engine import gguf, host

    with Path(model).open("rb") as file:
        header = gguf.read_header(file)
    path = Path(model)
    engine = GPT4All(
        path.name,
        model_path=str(path.parent),
        allow_download=False,
        n_threads=host.threads_for(header.weights_bytes),
        n_ctx=header.context_length,
        device="cpu",
        verbose=False,
    )

    def run(prompt: str, max_tokens: int) -> int:
        made = 0

        def count(token: int, text: str) -> bool:
            nonlocal made
            made += token >= 0
            return True

        engine.generate(prompt, max_tokens=max_tokens, temp=0.0, callback=count)
        return made

    _answer_lines(run)


def fastapi(port: str) -> None:
    """The same generation core behind FastAPI and uvicorn, with the same zero-cost engine in its process."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from service.access import Caller
    from service.connection import ClientWatch
    from service.keys import SCOPES, Limits
    from service.schema import TokenBounds, parse_generate
    from service.wsgi import runtime

    class Body(BaseModel):
        prompt: str
        max_tokens: int | None = None

    app = FastAPI()
    bounds = TokenBounds(256, 4096)
    caller = Caller("local", "127.0.0.1", frozenset(SCOPES), Limits())

    @app.post("/generate")
    def generate(body: Body) -> dict[str, Any]:
        request = parse_generate(body.model_dump(), bounds)
        generation = runtime.generator.begin(request, None, ClientWatch(None), caller)
        texts = []
        try:
            while not generation.ended:
                event = generation.step()
                texts.append(getattr(event, "text", ""))
        finally:
            generation.close()
        return {"response": "".join(texts), "usage": generation.account.usage()}

    runtime.engine.start()
    assert runtime.engine.wait_ready(30), runtime.engine.state
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    {"adapter": adapter, "gpt4all": gpt4all, "fastapi": fastapi}[sys.argv[1]](*sys.argv[2:])
