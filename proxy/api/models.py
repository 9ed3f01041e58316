"""`/v1/models`: what is served here."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from proxy.api.context import Context, context
from proxy.api.openapi import PAGE_ERRORS
from proxy.routing.registry import ServedModel, unknown_model

router = APIRouter(prefix="/v1/models", tags=["models"], responses=PAGE_ERRORS)
Here = Annotated[Context, Depends(context)]


@router.get("", summary="List the models")
async def list_models(here: Here) -> dict[str, Any]:
    models, aliases = here.registry.models, here.registry.aliases
    data = [_row(model, here) for model in models.values()]
    data += [_row(models[name], here, alias) for alias, name in aliases.items()]
    return {"object": "list", "data": data, "has_more": False}


@router.get("/{model:path}", summary="One model")
async def retrieve_model(model: str, here: Here) -> dict[str, Any]:
    name = here.registry.aliases.get(model, model)
    found = here.registry.models.get(name)
    if found is None:
        raise unknown_model(model, here.registry.models)
    return _row(found, here, model)


def _row(model: ServedModel, here: Context, alias: str | None = None) -> dict[str, Any]:
    """OpenAI's model object, and beside its fields what serves it and whether it can now."""
    name = model.plan.name
    return {
        "id": alias or name,
        "object": "model",
        "created": here.started,
        "owned_by": "joulegate",
        "model": name,
        "backend": model.spec.kind,
        "tasks": list(model.tasks),
        "ready": name not in here.registry.missing(),
    }
