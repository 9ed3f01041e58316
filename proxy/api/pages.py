"""Everything that is not a model's answer: models, energy, health, metrics and the documentation, by FastAPI."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from proxy.api import energy, models, ops
from proxy.api.openapi import model_paths
from proxy.errors import ApiError, InvalidRequest, Unavailable
from proxy.store.database import StoreUnavailable

log = logging.getLogger("joulegate.api")

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
_DESCRIPTION = (
    "An OpenAI-compatible inference proxy that tells every request its joules and grams of CO2e. "
    "Model endpoints take and give what their backends do, plus `energy` and the `X-Energy-*` headers."
)


def create_pages(lifespan: Lifespan, version: str) -> FastAPI:
    app = FastAPI(title="Joulegate", version=version, description=_DESCRIPTION, lifespan=lifespan, redoc_url=None)
    app.include_router(models.router)
    app.include_router(energy.router)
    app.include_router(ops.router)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(StoreUnavailable, _no_store)
    app.add_exception_handler(RequestValidationError, _invalid)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=version, description=_DESCRIPTION, routes=app.routes)
            schema["paths"] = {**model_paths(), **schema["paths"]}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document
    return app


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.encode(), error.status, error.headers, media_type="application/json")


async def _no_store(request: Request, error: Exception) -> Response:
    log.warning("stored receipts cannot be read: %s", error)  # where the store is, is not the client's to know
    told = Unavailable("Stored receipts cannot be read now; the proxy's log says why.", code="store_unavailable")
    return await _told(request, told)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"There is nothing at {request.url.path}." if error.status_code == 404 else str(error.detail)
    told = InvalidRequest(detail, status=error.status_code, headers=error.headers)
    return await _told(request, told)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return await _told(request, InvalidRequest(f"Invalid '{param}': {first['msg']}.", param=param))
