"""`vikdf serve` does what its OpenAPI page says, whatever schemathesis makes of that page."""

# ruff: noqa: F811 (fixtures that are imported)

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from fastapi.testclient import TestClient  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402
from test_server import QUESTION, SECRET, listening, parts  # noqa: E402, F401

from modeling_vikdf.server.app import create_app  # noqa: E402


OPERATIONS = {
    ("/v1/chat/completions", "POST"),
    ("/v1/knowledge", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
}
# The rules of a chat (who speaks when, which settings go together, what fits) are more than a JSON schema can say.
BEYOND_A_SCHEMA = [positive_data_acceptance]
# One model is enough: it is the page that is tried.
pytestmark = pytest.mark.parametrize("parts", [("qwen", "separate")], ids=["qwen"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def page(parts):
    with listening(parts, api_key=SECRET) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_all_operations_are_tried(parts):
    paths = TestClient(create_app(*parts)).get("/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == OPERATIONS


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize("path, method", sorted(OPERATIONS))
def test_what_the_page_says(page, path, method, mode):
    operation = page[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
        pytest.skip("takes nothing that could be wrong")

    answered = set()

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def ask(data):
        case = data.draw(operation.as_strategy(mode))
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "vikdf"  # any other is answered with 404
            if data.draw(st.booleans()):  # chats that are made up are refused before anything else is looked at
                case.body["messages"] = QUESTION
        headers = {"Authorization": f"Bearer {SECRET}"}
        answered.add(case.call_and_validate(headers=headers, excluded_checks=BEYOND_A_SCHEMA, timeout=120).status_code)

    ask()
    assert (200 in answered) == (mode is GenerationMode.POSITIVE and "{" not in path)
