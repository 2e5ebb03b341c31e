"""The routes of what the server keeps between requests: responses, conversations, files and batches."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import Route

from rvllm.api.batches.endpoints import Batches
from rvllm.api.batches.files import Files
from rvllm.api.batches.lines import Answering
from rvllm.api.batches.store import BatchStore
from rvllm.api.generate.generation import Service
from rvllm.api.generate.models import by_body
from rvllm.api.http.exchange import Endpoint, Exchange, Gate, Handler
from rvllm.api.openai.embeddings import refuse_encoder
from rvllm.api.responses.conversations import Conversations
from rvllm.api.responses.endpoints import Responses
from rvllm.api.responses.store import ResponseStore
from rvllm.api.schemas.responses import ResponsesRequest


def stateful_routes(service: Service, gate: Gate, answering: Mapping[str, Answering]) -> list[Route]:
    """Opens the stores and routes to them. answering: what answers a batch's lines, besides responses.

    Raises UsageError when a store cannot be opened.
    """
    config = service.config
    store = ResponseStore(
        config.responses_db, config.responses_ttl_hours * 3600, int(config.responses_max_mb * 1e6)
    )
    gate.closing.append(store.close)
    responses = Responses(service, gate, store)
    files = BatchStore(config.files_dir, int(config.files_max_mb * 1e6))
    gate.closing.append(files.close)
    at_once = config.batch_concurrency or max(1, service.ready.max_num_seqs // 2)
    return [
        *_response_routes(service, gate, responses),
        *_conversation_routes(gate, Conversations(store)),
        *_file_routes(gate, Files(files, int(gate.config.max_file_mb * 1e6))),
        *_batch_routes(gate, Batches(files, gate, {**answering, "/v1/responses": responses.create}, at_once)),
    ]


def _route(gate: Gate, method: str, path: str, handler: Handler, fields: tuple[str, ...] = ()) -> Route:
    name = path.replace("{id}", "ID").replace("{item}", "ITEM")
    return Route(path, Endpoint(gate, name, handler, fields), methods=[method])


def _response_routes(service: Service, gate: Gate, responses: Responses) -> list[Route]:
    async def create(exchange: Exchange, body: bytes) -> None:
        refuse_encoder(by_body(service, body))
        await responses.create(exchange, body)

    one = "/v1/responses/{id}"
    return [
        _route(gate, "POST", "/v1/responses", create, ResponsesRequest.__struct_fields__),
        _route(gate, "GET", one, responses.retrieve),
        _route(gate, "DELETE", one, responses.delete),
        _route(gate, "POST", f"{one}/cancel", responses.cancel),
        _route(gate, "GET", f"{one}/input_items", responses.input_items),
    ]


def _conversation_routes(gate: Gate, conversations: Conversations) -> list[Route]:
    one = "/v1/conversations/{id}"
    return [
        _route(gate, "POST", "/v1/conversations", conversations.create),
        _route(gate, "GET", one, conversations.retrieve),
        _route(gate, "POST", one, conversations.update),
        _route(gate, "DELETE", one, conversations.delete),
        _route(gate, "POST", f"{one}/items", conversations.add_items),
        _route(gate, "GET", f"{one}/items", conversations.list_items),
        _route(gate, "GET", f"{one}/items/{{item}}", conversations.get_item),
        _route(gate, "DELETE", f"{one}/items/{{item}}", conversations.delete_item),
    ]


def _file_routes(gate: Gate, files: Files) -> list[Route]:
    one = "/v1/files/{id}"
    return [
        Route(
            "/v1/files", Endpoint(gate, "/v1/files", files.create, receive=files.receive), methods=["POST"]
        ),
        _route(gate, "GET", "/v1/files", files.list_all),
        _route(gate, "GET", one, files.retrieve),
        _route(gate, "DELETE", one, files.delete),
        _route(gate, "GET", f"{one}/content", files.content),
    ]


def _batch_routes(gate: Gate, batches: Batches) -> list[Route]:
    one = "/v1/batches/{id}"
    return [
        _route(gate, "POST", "/v1/batches", batches.create),
        _route(gate, "GET", "/v1/batches", batches.list_all),
        _route(gate, "GET", one, batches.retrieve),
        _route(gate, "DELETE", one, batches.delete),
        _route(gate, "POST", f"{one}/cancel", batches.cancel),
    ]
