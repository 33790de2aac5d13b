"""Routes of embedding models. What is served generates text, so each says so instead of not being there."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from tokenmill.server.errors import ApiError
from tokenmill.server.routes.access import Served, new_router

router = new_router()


@router.post("/v1/embeddings")
@router.post("/v1/score")
@router.post("/score")
@router.post("/v1/rerank")
@router.post("/rerank")
async def not_an_embedder(body: dict[str, Any], served: Served) -> Response:
    """400: the model is not an embedding model."""
    raise ApiError(
        f"{served.name} is not an embedding model; it generates text", param="model", code="unsupported_model"
    )
