"""The OpenAPI document: whole, described, with examples that are valid, and readable by other languages' tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import msgspec
import pytest
from jsonschema import Draft202012Validator

from portd.adapters.http.calls import encode
from portd.adapters.http.events import EventCalls
from portd.adapters.http.hosts import HostCalls
from portd.adapters.http.lan import LanCalls
from portd.adapters.http.leases import LeaseCalls
from portd.adapters.http.names import NameCalls
from portd.adapters.http.openapi import document, openapi_route
from portd.adapters.http.openapi_examples import REQUESTS
from portd.adapters.http.openapi_texts import DESCRIPTIONS, OPERATIONS
from portd.adapters.http.ports import PortCalls
from portd.adapters.http.problems import STATUS, TITLE
from portd.adapters.http.revisions import Revisions
from portd.adapters.http.services import ServiceCalls
from portd.adapters.http.status import StatusCalls

REVISIONS = Revisions("")
ROUTES = [
    *LeaseCalls(None, None).routes(),
    *ServiceCalls(None, None, None, REVISIONS).routes(),
    *EventCalls(None, REVISIONS).routes(),
    *PortCalls(None, None).routes(),
    *HostCalls(None, None).routes(),
    *LanCalls(None).routes(),
    *NameCalls(None).routes(),
    *StatusCalls(None, {}, None, None, None).routes(),
]
ROUTES.append(openapi_route(ROUTES))
DOCUMENT = json.loads(encode(document(ROUTES)))
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS_SEEN = {
    (method.upper(), path): one for path, some in DOCUMENT["paths"].items() for method, one in some.items()
}


def walk(value, at=""):
    """Yield every object of the document and where it is."""
    if isinstance(value, dict):
        yield at, value
        for key, part in value.items():
            yield from walk(part, f"{at}/{key}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from walk(part, f"{at}/{number}")


def patterns():
    """Return every pattern of the document."""
    return sorted({found["pattern"] for _, found in walk(DOCUMENT) if isinstance(found.get("pattern"), str)})


def resolved(schema):
    """Return a schema that can be validated by itself."""
    return {**schema, "components": DOCUMENT["components"]}


def test_every_property_is_described():
    bare = [
        f"{name}.{field}"
        for name, schema in SCHEMAS.items()
        for field, part in schema.get("properties", {}).items()
        if not part.get("description") and field != "kind"
    ]
    assert not bare


def test_every_parameter_is_described():
    bare = [
        (key, one["name"])
        for key, op in OPERATIONS_SEEN.items()
        for one in op.get("parameters", [])
        if not one["description"]
    ]
    assert not bare


def test_every_description_of_type_is_of_one_that_is_there():
    types = {*SCHEMAS, "LeaseQuery", "ServiceQuery", "HistoryQuery"}
    assert not [name for name in DESCRIPTIONS if "." in name and name.partition(".")[0] not in types]


@pytest.mark.parametrize("key", OPERATIONS_SEEN, ids=" ".join)
def test_every_operation_has_words_and_an_example(key):
    operation = OPERATIONS_SEEN[key]
    assert key in OPERATIONS, "its words belong into openapi_texts.OPERATIONS"
    assert operation["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}
    assert operation["description"]
    bodies = [answer["content"] for status, answer in operation["responses"].items() if status in ("200", "201")]
    assert all(media["example"] for content in bodies for media in content.values())
    if "requestBody" in operation and operation["requestBody"]["required"]:
        assert operation["requestBody"]["content"]["application/json"]["example"]


def test_operation_ids_are_unique_and_readable():
    ids = [operation["operationId"] for operation in OPERATIONS_SEEN.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", one) for one in ids), ids


def test_every_example_fits_its_schema():
    wrong = []
    for at, found in walk(DOCUMENT["paths"]):
        if "example" in found and "schema" in found and "text/" not in at:
            wrong += [
                (at, error.message)
                for error in Draft202012Validator(resolved(found["schema"])).iter_errors(found["example"])
            ]
    assert not wrong


@pytest.mark.parametrize("key", REQUESTS, ids=" ".join)
def test_every_example_of_a_request_is_accepted(key):
    bodies = {(route.method, route.path): route.body for route in ROUTES}
    if key in bodies:
        msgspec.convert(REQUESTS[key], bodies[key])


def test_every_code_has_a_status_a_title_and_a_response():
    assert STATUS.keys() == TITLE.keys() == DOCUMENT["components"]["responses"].keys()


def test_every_operation_lists_the_refusals_that_any_may_have():
    for key, operation in OPERATIONS_SEEN.items():
        assert {"400", "403", "405", "500"} <= operation["responses"].keys(), key


def test_patterns_are_no_longer_pythons():
    assert patterns()
    assert not [pattern for pattern in patterns() if r"\Z" in pattern or r"\A" in pattern or "(?P" in pattern]


@pytest.mark.skipif(shutil.which("node") is None, reason="not installed: node")
def test_patterns_compile_and_match_in_ecma262():
    program = """
const patterns = JSON.parse(require("fs").readFileSync(0, "utf8"));
for (const pattern of patterns) new RegExp(pattern, "u");
const label = patterns.find((pattern) => pattern.startsWith("^[a-z0-9]("));
if (!new RegExp(label, "u").test("orders") || new RegExp(label, "u").test("Orders")) throw new Error(label);
"""
    subprocess.run(["node", "-e", program], input=json.dumps(patterns()).encode(), check=True, timeout=60)


@pytest.mark.skipif(shutil.which("go") is None, reason="not installed: go")
def test_patterns_compile_in_re2(tmp_path):
    program = """package main

import ("encoding/json"; "os"; "regexp")

func main() {
	var patterns []string
	if err := json.NewDecoder(os.Stdin).Decode(&patterns); err != nil { panic(err) }
	for _, pattern := range patterns { regexp.MustCompile(pattern) }
}
"""
    (tmp_path / "main.go").write_text(program)
    subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(patterns()).encode(), check=True, timeout=120
    )


@pytest.fixture(scope="session")
def ajv(tmp_path_factory):
    """Return a directory with npm's ajv in it; skips where it can't be installed."""
    if shutil.which("npm") is None:
        pytest.skip("not installed: npm")
    directory = tmp_path_factory.mktemp("ajv")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=0"]
    found = subprocess.run(
        [*command, "--prefix", str(directory), "ajv@8", "ajv-formats@3"], capture_output=True, check=False, timeout=120
    )
    if found.returncode:
        pytest.skip("npm can't install ajv")
    return directory


def test_schemas_compile_in_ajv_and_accept_a_lease_request(ajv):
    program = """
const Ajv = require("ajv/dist/2020"), formats = require("ajv-formats");
const document = JSON.parse(require("fs").readFileSync(0, "utf8"));
const ajv = new Ajv({ strict: false, discriminator: false });
formats(ajv);
ajv.addSchema(document, "portd");
for (const name of Object.keys(document.components.schemas)) ajv.compile({ $ref: `portd#/components/schemas/${name}` });
const request = ajv.compile({ $ref: "portd#/components/schemas/LeaseRequest" });
if (!request({ service: "orders", check: { kind: "http", path: "/healthz" } })) throw new Error("a request");
if (request({ service: "Orders" })) throw new Error("Orders is not a label");
"""
    subprocess.run(["node", "-e", program], cwd=ajv, input=json.dumps(DOCUMENT).encode(), check=True, timeout=60)
