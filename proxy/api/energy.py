"""`/v1/energy`: receipts and devices."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from proxy.api.context import Context, context
from proxy.api.receipts import encode_receipt
from proxy.energy.attribution import DeviceBalance
from proxy.energy.quantities import Microjoules, joules
from proxy.errors import NotFound

router = APIRouter(prefix="/v1/energy", tags=["energy"])
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
    if request.scope.get("joulegate.admin") or request.scope.get("joulegate.key") == key:
        return Response(document, media_type="application/json")
    raise _no_receipt(id)


def _no_receipt(id: str) -> NotFound:
    return NotFound(f"There is no receipt '{id[:64]}'.", param="id", code="receipt_not_found")
