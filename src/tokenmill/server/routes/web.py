"""``GET /``: the web page, and the files that it loads."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from tokenmill.server.routes.access import new_router
from tokenmill.server.web_files import WEB_FILES

router = new_router()


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/web/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def web_file(request: Request) -> Response:
    file = WEB_FILES.get(request.url.path)
    if file is None:
        raise HTTPException(404)
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=file.headers())
    return Response(file.body, media_type=file.media_type, headers=file.headers())
