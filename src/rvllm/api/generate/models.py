"""Several models behind one address: which of them a request is for."""

from __future__ import annotations

import msgspec

from rvllm.api.generate.generation import Service
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import check_model


class _Named(msgspec.Struct):
    """What of a body tells whom it is for."""

    model: str | None = None


def all_names(service: Service) -> tuple[str, ...]:
    """The names of all models behind the address of this one."""
    return tuple(name for one in service.siblings for name in one.served_names)


def by_name(service: Service, name: str) -> Service:
    """The model of this name among those behind one address. Raises ApiError 404 that names them all."""
    check_model(name, all_names(service))
    return next(one for one in service.siblings if name in one.served_names)


def by_body(service: Service, body: bytes) -> Service:
    """The model that a request's body names; the first where it names none, or is no JSON object.

    Raises ApiError 404 for a model that is not served.
    """
    if len(service.siblings) == 1:
        return service
    try:
        name = msgspec.json.decode(body, type=_Named).model
    except msgspec.DecodeError:  # whoever parses all of it will say what is wrong
        name = None
    return service.siblings[0] if name is None else by_name(service, name)


def awake(service: Service) -> Service:
    """The model that has the device, of those behind one address."""
    return next((one for one in service.siblings if not one.engine.sleep_level), service)


def refuse_encoder(service: Service) -> None:
    """Raises a 400 when the model pools texts and generates nothing."""
    facts = service.ready.facts
    if facts.labels is not None:
        raise invalid(f"{facts.architecture} gives classes and generates no text: use /classify")
    if facts.embedding_size is not None:
        raise invalid(f"{facts.architecture} gives embeddings and generates no text: use /v1/embeddings")
