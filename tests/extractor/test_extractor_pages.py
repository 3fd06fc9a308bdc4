"""Pages of the extractor's lists."""

import base64

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from headrace_extractor.errors import FieldInvalid
from headrace_extractor.rpc.pages import of_a_page, offset_of, token_for


def test_a_page_ends_before_it_is_larger_than_clients_take():
    large = StringValue(value="x" * 900_000)

    assert of_a_page([large] * 5) == [large] * 2
    assert of_a_page([StringValue(value="x" * 3_000_000), large]) == [StringValue(value="x" * 3_000_000)]
    assert of_a_page([StringValue(value="x")] * 1000) == [StringValue(value="x")] * 1000
    assert of_a_page(StringValue() for _ in range(0)) == []


@pytest.mark.parametrize("content", [b"-5", b"x", b"", b"1" * 5000])
def test_a_token_that_was_not_given_out_is_refused(content):
    with pytest.raises(FieldInvalid) as caught:
        offset_of(base64.urlsafe_b64encode(content or b" ").decode())

    assert caught.value.field == "page_token"


def test_a_token_is_the_offset_of_its_page():
    assert (offset_of(""), offset_of(token_for(0)), offset_of(token_for(1234))) == (0, 0, 1234)
