"""The application: routes, error forms, and the gate around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tokenmill import __version__
from tokenmill.server.errors import install_handlers
from tokenmill.server.gate import Gate
from tokenmill.server.routes import anthropic, chat, completions, infill, operations, pooling, responses, tokens, web
from tokenmill.server.served import ServedModel

ROUTERS = (
    operations.router,
    completions.router,
    chat.router,
    responses.router,
    anthropic.router,
    infill.router,
    tokens.router,
    pooling.router,
    web.router,
)


def create_app(served: ServedModel) -> ASGIApp:
    """The ASGI application of a model that has been started."""
    # No /docs: FastAPI's page loads scripts from another host.
    app = FastAPI(title="Tokenmill", version=__version__, docs_url=None, redoc_url=None)
    app.state.served = served
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    gated: ASGIApp = Gate(app, served)
    if served.config.cors_origins:
        gated = CORSMiddleware(
            gated,
            allow_origins=list(served.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    return gated
