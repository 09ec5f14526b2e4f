"""A bucket in memory: gcp-storage-emulator, and what it lacks of Google's service.

That is preconditions on the generation of an object, which leases need, and the generation in the headers of a
download. Requests are served one after the other, so that a precondition and what follows it are one operation.

`python bucket.py NAME` serves the bucket NAME until it is killed, and prints the address for the environment variables
STORAGE_EMULATOR_HOST, of gcsfs, and TENSORSTORE_GCS_HTTP_URL.
"""

import logging
import sys
import threading
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage


def generation(request: Any, storage: Storage) -> str:
    """The generation of the object that a request is about; "0" where there is none."""
    try:
        named = request.query.get("name", [None])[0] or request.params.get("object_id")
        if named is None:
            named = request.data["meta"]["name"]
        return storage.get_file_obj(request.params["bucket_name"], named)["generation"]
    except NotFound:
        return "0"


def checked(handle: Any, request: Any, response: Any, storage: Storage) -> None:
    """Calls `handle` where the request's preconditions hold."""
    query = request.query
    if "ifGenerationMatch" in query and generation(request, storage) != query["ifGenerationMatch"][0]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    if "ifGenerationNotMatch" in query and generation(request, storage) == query["ifGenerationNotMatch"][0]:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    if request.method == server.GET and query.get("alt") == ["media"]:
        response["X-Goog-Generation"] = generation(request, storage)
    handle(request, response, storage)


class Quiet(HTTPServer):
    """A server that does not print what comes of clients that no longer want their answer."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def serve(bucket: str) -> HTTPServer:
    """A server of the bucket, in a thread of this process, on a free port; `shutdown()` ends it."""
    server.HANDLERS = tuple(
        (route, {method: partial(checked, handle) for method, handle in methods.items()})
        for route, methods in server.HANDLERS
    )
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # an object that is not there is an error
    storage = Storage(use_memory_fs=True)
    storage._write_config_to_file = lambda: None  # a list of all objects, at each request
    buckets.create_bucket(bucket, storage)
    found = Quiet(("127.0.0.1", 0), partial(server.RequestHandler, storage))
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return found


if __name__ == "__main__":
    served = serve(sys.argv[1])
    print(f"http://127.0.0.1:{served.server_port}", flush=True)
    threading.Event().wait()
