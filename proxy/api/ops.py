"""What operators and their tools ask: is it alive, can it serve, its metrics."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, RedirectResponse

from proxy.api.context import Context, context
from proxy.api.openapi import error_response
from proxy.errors import NotFound

router = APIRouter(tags=["operations"])
Here = Annotated[Context, Depends(context)]


@router.get("/health", summary="Alive")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready", summary="Whether every configured model can serve", responses={503: {"description": "Not yet"}})
async def ready(here: Here) -> JSONResponse:
    if here.intake.draining:
        return JSONResponse({"status": "draining", "missing": {}}, 503, headers={"Retry-After": "5"})
    missing = here.registry.missing()
    # A model that has come by a reload must not take the node, and all others with it, out of a load balancer.
    coming = {name: missing.pop(name) for name in here.registry.newcomers if name in missing}
    if missing:
        body = {"status": "not ready", "missing": missing, "coming": coming}
        return JSONResponse(body, 503, headers={"Retry-After": "2"})
    return JSONResponse({"status": "ready", "missing": {}, "coming": coming})


@router.get(
    "/metrics", summary="Prometheus metrics", responses={404: error_response("Switched off")}, response_class=Response
)
async def metrics(here: Here) -> Response:
    if here.render_metrics is None:
        raise NotFound("Metrics are switched off (server.metrics).")
    return Response(here.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")
