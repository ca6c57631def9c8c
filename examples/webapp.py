"""A web application that hands work to a queue and waits for the result.

Start ``codeq serve --dev``, then in this folder (needs ``pip install 'codeq[examples]'``):

    uvicorn webapp:app --port 8000
    curl localhost:8000/greetings -d '{"name": "Ada"}'

with worker.py running beside it. When the work takes longer than PATIENCE_SECONDS the answer is 202
and says where the result will be.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codeq import Client, CodeqError

PATIENCE_SECONDS = 5

client: Client


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    global client  # made here, since its connections belong to the loop of the application
    async with Client("http://localhost:8080", token="dev-producer") as client:
        yield


async def create(request: Request) -> Response:
    key = request.headers.get("idempotency-key", "")  # a browser that asks twice gets one task
    task = await client.create("greet", await request.json(), idempotency_key=key)
    return await answer(task.id, PATIENCE_SECONDS)


async def show(request: Request) -> Response:
    return await answer(request.path_params["id"], 0)


async def answer(task_id: str, wait_seconds: int) -> Response:
    found = await client.result(task_id, wait_seconds=wait_seconds)
    if found is None:
        return JSONResponse({"id": task_id}, 202, {"location": f"/greetings/{task_id}"})
    if found.result.status != "COMPLETED":
        return JSONResponse({"id": task_id, "error": found.result.error}, 502)
    return JSONResponse({"id": task_id, "result": found.result.json()})


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, CodeqError)
    status = {"not-found": 404, "validation-error": 400, "conflict": 409}.get(error.slug, 503)
    return JSONResponse({"error": error.message}, status)


app = Starlette(
    routes=[Route("/greetings", create, methods=["POST"]), Route("/greetings/{id}", show)],
    exception_handlers={CodeqError: refused},
    lifespan=lifespan,
)
