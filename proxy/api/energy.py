"""`/v1/energy`: receipts and devices."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from proxy.api.auth import may_see
from proxy.api.context import Context, context
from proxy.api.listing import encode_page
from proxy.api.openapi import PAGE_ERRORS
from proxy.api.receipts import encode_receipt
from proxy.energy.attribution import DeviceBalance
from proxy.energy.quantities import Microjoules, joules
from proxy.errors import InvalidRequest, NotFound
from proxy.store.receipts import MAXIMUM_PAGE, Page

router = APIRouter(prefix="/v1/energy", tags=["energy"], responses=PAGE_ERRORS)
Here = Annotated[Context, Depends(context)]
_WAIT_SECONDS = 2.0


@router.get("/receipts/{id}", summary="The energy, carbon and provenance of one request")
async def retrieve_receipt(
    id: str, request: Request, here: Here, wait: Annotated[Literal["settled"] | None, Query()] = None
) -> Response:
    """`?wait=settled` waits for the settled figures, two seconds at most; what is known then is returned."""
    accountant = here.accountant
    found = await accountant.settled_receipt(id, _WAIT_SECONDS) if wait else accountant.receipt(id)
    if found is not None:
        return _if_theirs(request, id, found.request.key, encode_receipt(found))
    stored = await run_in_threadpool(here.store.get, id)
    if stored is None:
        raise _no_receipt(id)
    return _if_theirs(request, id, stored.key, stored.document)


@router.get("/receipts", summary="The receipts, the newest first")
async def list_receipts(
    request: Request,
    here: Here,
    limit: Annotated[int, Query(ge=1, le=MAXIMUM_PAGE)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
    model: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """`after` is the id of the last receipt of the page before. A key sees its own, an admin (or, without keys,
    anyone) all.
    """
    caller = request.scope
    if not caller.get("joulegate.admin") and caller.get("joulegate.key") is None:
        return Response(encode_page(Page([], has_more=False)), media_type="application/json")
    key = None if caller.get("joulegate.admin") else caller["joulegate.key"]
    find = partial(here.store.list, limit=limit, after=after, model=model, key=key)
    try:
        page = await run_in_threadpool(find)
    except ValueError as error:
        raise InvalidRequest(str(error), param="after", code="receipt_not_found") from error
    return Response(encode_page(page), media_type="application/json")


@router.get("/devices", summary="The metered devices and their books")
async def list_devices(here: Here) -> dict[str, Any]:
    states = {meter.device: meter for meter in here.meters()}
    data = [_device_row(balance, states.get(balance.device)) for balance in here.accountant.ledger.devices()]
    return {"object": "list", "data": data, "has_more": False}


def _device_row(balance: DeviceBalance, state: Any) -> dict[str, Any]:
    return {
        "device": balance.device,
        "name": balance.name,
        "meter": balance.meter,
        "estimated": balance.estimated,
        "meter_accuracy_ratio": balance.accuracy_ratio,
        "up": bool(state is not None and state.up),
        "error": state.error if state is not None else None,
        "power_watts": balance.power,
        "idle_power_watts": balance.idle_power,
        "counter_joules": joules(balance.counter),
        "requests_joules": joules(balance.requests),
        "idle_joules": joules(balance.idle),
        "foreign_joules": joules(balance.foreign),
        "unattributed_joules": joules(balance.unattributed),
        "pending_joules": joules(balance.pending),
        "residual_joules": joules(Microjoules(balance.residual)),
    }


def _if_theirs(request: Request, id: str, key: str | None, document: bytes) -> Response:
    """A receipt for its owner or an admin; others learn nothing, not even that it exists."""
    if may_see(request.scope, key):
        return Response(document, media_type="application/json")
    raise _no_receipt(id)


def _no_receipt(id: str) -> NotFound:
    return NotFound(f"There is no receipt '{id[:64]}'.", param="id", code="receipt_not_found")
