"""What is wrong with a document: words for people, and a pointer for programs."""

from __future__ import annotations

import msgspec
import pytest

from portd.core.requests import LeaseRequest
from portd.core.validation import explain

CASES = [
    ({"service": "My App"}, "service must be 1 to 63 lower-case letters, digits and hyphens: try 'my-app'", "/service"),
    ({"service": ""}, "service must be 1 to 63 lower-case letters, digits and hyphens: try 'my-app'", "/service"),
    ({"service": "a", "instance": "x" * 64}, "instance must be 1 to 63 lower-case letters", "/instance"),
    ({}, "'service' is missing", "/service"),
    ({"service": "a", "prot": 1}, "'prot' is not a known field", "/prot"),
    ({"service": 5}, "service must be a text, not a whole number", "/service"),
    ({"service": "a", "pid": 0}, "pid must be at least 1", "/pid"),
    ({"service": "a", "ttl": 0}, "ttl must be at least 0.1", "/ttl"),
    ({"service": "a", "protocol": "sctp"}, "protocol can't be 'sctp'", "/protocol"),
    ({"service": "a", "tags": [""]}, "tags must not be empty", "/tags/0"),
    ({"service": "a", "tags": ["a\n"]}, "tags has a character that is not allowed", "/tags/0"),
    ({"service": "a", "tags": ["x"] * 65}, "tags must have at most 64 entries", "/tags"),
    ({"service": "a", "metadata": []}, "metadata must be an object, not an array", "/metadata"),
    ({"service": "a", "check": {"kind": "magic"}}, "kind can't be 'magic'", "/check/kind"),
    ({"service": "a", "check": {"kind": "http", "path": "x"}}, "path must begin with '/'", "/check/path"),
    ([], "the body must be an object, not an array", ""),
]


@pytest.mark.parametrize(("document", "words", "pointer"), CASES, ids=[case[1][:40] for case in CASES])
def test_fault_is_explained_in_words_with_a_pointer(document, words, pointer):
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.json.decode(msgspec.json.encode(document), type=LeaseRequest)
    said, where = explain(error.value)
    assert said.startswith(words)
    assert where == pointer


@pytest.mark.parametrize("document", [case[0] for case in CASES])
def test_no_regular_expression_or_type_name_is_in_the_words(document):
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.json.decode(msgspec.json.encode(document), type=LeaseRequest)
    said, _ = explain(error.value)
    assert not any(word in said for word in ("regex", "Expected", "`", "str", "int ", "^", "enum"))
