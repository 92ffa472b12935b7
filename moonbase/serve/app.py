"""The HTTP application: which path leads where, what surrounds every route, and the service's beginning and end."""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import UserError
from moonbase.serve import anthropic, openai
from moonbase.serve.backend import Backend
from moonbase.serve.body import read_body
from moonbase.serve.errors import RequestError, from_user_error
from moonbase.serve.gate import Gate, Record, Recorder, error_response
from moonbase.serve.generation import ServiceLike, deadline_error
from moonbase.serve.settings import Settings
from moonbase.serve.streaming import CLIENT_CLOSED, Disconnected, unless_gone

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moonbase.data import Tokenizer

PAGE = Path(__file__).parent / "page"

PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Handler = Callable[[Backend, bytes, Record, float], Awaitable[Any]]


def create_app(
    service: ServiceLike,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    context_length: int,
    settings: Settings = Settings(),
    access_log: Callable[[str], None] | None = lambda line: print(line, file=sys.stderr, flush=True),
) -> FastAPI:
    """The application of one model; it starts and stops `service`.

    vocab_size: of the model, padding included. context_length: tokens of prompt and answer together. access_log: takes
    one JSON object per request, None for silence. `app.state.backend` is the Backend.
    """
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    backend = Backend(service, tokenizer, vocab_size, context_length, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop(0.0 if backend.lifetime.closing.is_set() else settings.grace)
            backend.close()

    def finished(record: Record) -> None:
        backend.metrics.request_ended(record, time.monotonic() - record.started)
        if access_log is not None:
            access_log(record.line())

    app = FastAPI(title="moonbase", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
                  routes=[*_api_routes(backend), *_page_routes()], redirect_slashes=False)
    app.state.backend = backend
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(UserError, _answer_user_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    # The last one added is the outermost.
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id", "request-id", "retry-after",
                                                               "x-moonbase-notes"])
    app.add_middleware(Recorder, finished=finished)
    return app


def _api_routes(backend: Backend) -> list[Any]:
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    settings, started = backend.settings, time.time()

    def post(path: str, handler: Handler) -> Route:
        async def endpoint(request: Any) -> Any:
            record = request.scope["moonbase.record"]
            record.route = path
            deadline = asyncio.get_running_loop().time() + settings.request_timeout
            body = await read_body(request, settings.most_body_bytes, settings.body_timeout)
            try:
                async with asyncio.timeout_at(deadline):
                    return await unless_gone(request.receive, handler(backend, body, record, deadline))
            except TimeoutError:
                raise deadline_error() from None
            except Disconnected:
                raise RequestError(CLIENT_CLOSED, "the client has gone", code="disconnected") from None

        return Route(path, endpoint, methods=["POST"])

    def get(path: str, handler: Callable[[Any], Any]) -> Route:
        async def endpoint(request: Any) -> Any:
            request.scope["moonbase.record"].route = path
            answer = handler(request)
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return Route(path, endpoint, methods=["GET"])

    async def count(backend: Backend, body: bytes, record: Record, deadline: float) -> JSONResponse:
        return JSONResponse(await anthropic.count_tokens(backend, body, record))

    def surface(request: Any) -> Any:
        return anthropic if request.scope["moonbase.record"].surface == "anthropic" else openai

    def health(_: Any) -> JSONResponse:
        closing = backend.lifetime.closing.is_set()
        return JSONResponse({"status": "stopping" if closing else "ok", "model": backend.names[0]},
                            503 if closing else 200)

    def metrics(_: Any) -> Response:
        text, kind = backend.metrics.text()
        return Response(text, headers={"content-type": kind})

    routes = [
        post("/v1/chat/completions", openai.chat_completions),
        post("/v1/completions", openai.completions),
        get("/health", health),
        get("/metrics", metrics),
    ]
    for base in ("", "/anthropic"):
        routes += [
            post(f"{base}/v1/messages", anthropic.messages),
            post(f"{base}/v1/messages/count_tokens", count),
            get(f"{base}/v1/models", lambda request: surface(request).models(backend, started)),
            # A name may hold slashes, as those of a hub do.
            get(f"{base}/v1/models/{{name:path}}",
                lambda request: surface(request).model(backend, request.path_params["name"], started)),
        ]
    return routes


def _page_routes() -> list[Any]:
    """The web page's files, each under its name; no other file can be asked for."""
    from starlette.responses import FileResponse
    from starlette.routing import Route

    def show(name: str) -> Route:
        kind = {".js": "text/javascript"}.get(Path(name).suffix) or mimetypes.guess_type(name)[0]

        async def endpoint(request: Any) -> FileResponse:
            request.scope["moonbase.record"].route = path
            return FileResponse(PAGE / name, media_type=kind, headers=PAGE_HEADERS)

        path = "/" if name == "index.html" else f"/{name}"
        return Route(path, endpoint, methods=["GET"])

    return [show(file.name) for file in sorted(PAGE.glob("*.*")) if file.is_file()]


async def _answer_request_error(request: Any, error: Any) -> Any:
    return error_response(error, request.scope["moonbase.record"])


async def _answer_user_error(request: Any, error: Any) -> Any:
    return error_response(from_user_error(error), request.scope["moonbase.record"])


async def _answer_http_exception(request: Any, error: Any) -> Any:
    """Starlette's own refusals: unknown paths, wrong methods."""
    record = request.scope["moonbase.record"]
    words = {404: f"there is nothing at {record.path[:200]!r}",
             405: f"{record.method[:20]} does not work at {record.path[:200]!r}"}.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    return error_response(RequestError(error.status_code, words, code=codes.get(error.status_code),
                                       headers=error.headers or {}), record)
