"""The description of OpenAI's and Anthropic's routes: it is true, and no request that it allows breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from edge_runtime.server.settings import Settings
from server.conftest import Served, running

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/chat/completions/input_tokens": "POST",
    "/v1/responses": "POST",
    "/v1/responses/input_tokens": "POST",
    "/v1/responses/{response_id}": "GET",
    "/v1/responses/{response_id}/cancel": "POST",
    "/v1/responses/{response_id}/input_items": "GET",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
    "/v1/embeddings": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def brief(own_store: Path) -> Iterator[Served]:
    """A server whose answers are short, so that there can be many."""
    with running(Settings(port=0, models=("demo",), max_tokens=3, heartbeat_s=0.05)) as served:
        yield served


def test_every_route_is_described(brief):
    found = brief.app.openapi()["paths"]
    for path, method in ROUTES.items():
        described = found[path][method.lower()]["responses"]
        assert {"4XX", "5XX"} <= described.keys()
        assert "422" not in described, "mistakes are answered with 400, as OpenAI does"
        assert all("schema" in reply["content"]["application/json"] for reply in described.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
def test_no_request_breaks_the_server(brief, path):
    schema = schemathesis.openapi.from_url(f"{brief.url}/openapi.json")
    operation = schema[path][ROUTES[path]]
    statuses = set()

    @settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(case=st.one_of(*map(operation.as_strategy, GenerationMode)), named=st.booleans())
    def ask(case: Any, named: bool) -> None:
        """Allowed requests, and those that break the description in one place, which must be noticed."""
        if named and isinstance(case.body, dict):
            case.body["model"] = "demo"  # hardly ever does chance name a model that is there
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    ask()
    assert statuses & {200, 400} or "{" in path, "something got past the name of the model"
