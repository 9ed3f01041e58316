"""`/v1/responses/{id}`: stored responses, forwarded to the backend that made them. No inference, so no receipt."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from proxy.api.auth import may_see
from proxy.api.context import Context, context
from proxy.api.openapi import BACKEND_ERRORS, FORWARDED
from proxy.errors import ApiError, NotFound, Unavailable, UpstreamFailed
from proxy.relay import refusals
from proxy.relay.reply import stays_behind
from proxy.relay.responses import StoredResponse
from proxy.relay.upstream import Answer, BrokeOff, Unreachable

router = APIRouter(prefix="/v1/responses", tags=["stored responses"], responses=BACKEND_ERRORS | FORWARDED)
Here = Annotated[Context, Depends(context)]


@router.get("/{id}", summary="A stored response", response_class=Response)
async def retrieve_response(id: str, request: Request, here: Here) -> Response:
    return await _forward("GET", id, "", request, here)


@router.get("/{id}/input_items", summary="What a stored response answered", response_class=Response)
async def list_input_items(id: str, request: Request, here: Here) -> Response:
    return await _forward("GET", id, "/input_items", request, here)


@router.delete("/{id}", summary="Delete a stored response", response_class=Response)
async def delete_response(id: str, request: Request, here: Here) -> Response:
    answer = await _forward("DELETE", id, "", request, here)
    here.responses.forget(id)
    return answer


@router.post("/{id}/cancel", summary="Cancel a response that is made in the background", response_class=Response)
async def cancel_response(id: str, request: Request, here: Here) -> Response:
    return await _forward("POST", id, "/cancel", request, here)


async def _forward(
    method: Literal["GET", "DELETE", "POST"], id: str, rest: str, request: Request, here: Here
) -> Response:
    """The id is one that a backend gave and we remember, so nothing of a stranger's making gets into its address."""
    stored = here.responses.find(id)
    if stored is None or not may_see(request.scope, stored.key) or not _lives(stored, here):
        raise NotFound(f"There is no response '{id[:128]}'.", param="id", code="response_not_found")
    query = f"?{request.url.query}" if request.url.query else ""
    url = f"{stored.route.url}/v1/responses/{id}{rest}{query}"
    headers = {"Authorization": stored.route.authorization} if stored.route.authorization else {}
    try:
        answer = await here.upstream.request(method, url, headers)
        return await _passed(answer)
    except Unreachable as error:
        raise Unavailable("The backend that keeps this response is not answering.") from error
    except BrokeOff as error:
        raise UpstreamFailed("The backend broke off its answer.") from error


def _lives(stored: StoredResponse, here: Context) -> bool:
    """Whether the backend is still where it was: one that was started again has forgotten its responses."""
    urls = (state.url for state in here.registry.states.values() if state.url is not None)
    return any(url.rstrip("/") == stored.route.url for url in urls)


async def _passed(answer: Answer) -> Response:
    headers = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in answer.headers
        if not stays_behind(name.lower())
    }
    if answer.content_type.startswith(b"text/event-stream"):
        return StreamingResponse(answer.chunks(), answer.status, headers)
    body = await answer.whole()
    if answer.status >= 300:
        raise _refused(answer, body)
    return Response(body, answer.status, headers)


def _refused(answer: Answer, body: bytes) -> ApiError:
    if answer.status >= 400:
        return refusals.translate(answer.status, body, answer.header("retry-after"))
    return UpstreamFailed(f"The backend answered with a redirect ({answer.status}).")
