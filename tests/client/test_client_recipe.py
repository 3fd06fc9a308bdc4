from __future__ import annotations

import pytest

from headrace.extractor.v1 import extraction_pb2 as pb
from headrace_client import LongDocuments, Recipe, TokenWindow, errors
from headrace_client.rpc.convert.recipes import recipe_from_pb, recipe_to_pb
from headrace_extractor.corpora.recipe import Recipe as ServerRecipe
from headrace_extractor.corpora.recipe import TokenWindow as ServerWindow
from headrace_extractor.rpc.convert import recipes as server


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"packing": "one_document"},
        {"long_documents": "truncate"},
        {"packing": "one_document", "long_documents": "split"},
        {"window": (-1, 0)},
        {"window": TokenWindow(2, -3)},
        {"max_documents": 7},
    ],
)
def test_a_recipe_arrives_at_the_server_and_comes_back(recipe):
    sent = Recipe(**recipe)

    received = server.recipe_from_pb(pb.Recipe.FromString(recipe_to_pb(sent).SerializeToString()))

    assert received.long_documents == sent.long_documents
    assert received.window == (ServerWindow(start=sent.window.start, end=sent.window.end) if sent.window else None)
    assert recipe_from_pb(server.recipe_to_pb(received)) == sent


def test_unset_fields_are_the_defaults_on_both_sides():
    assert server.recipe_from_pb(pb.Recipe()) == ServerRecipe()
    assert recipe_from_pb(pb.Recipe()) == Recipe()
    assert Recipe().long_documents is LongDocuments.SPLIT
    assert Recipe(packing="one_document").long_documents is LongDocuments.TRUNCATE


def test_an_unknown_way_with_long_documents_is_refused():
    with pytest.raises(Exception, match="long_documents") as caught:
        server.recipe_from_pb(pb.Recipe(long_documents=77))
    assert caught.value.field == "spec.recipe.long_documents"
    with pytest.raises(errors.InvalidArgument, match="split, truncate"):
        Recipe(long_documents="drop")


@pytest.mark.parametrize(("text", "window"), [("-1:", (-1, 0)), (":16", (0, 16)), ("2:-2", (2, -2)), (":", (0, 0))])
def test_windows_are_read_as_slices(text, window):
    assert TokenWindow.parse(text) == TokenWindow(*window)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3", "1.5:"])
def test_what_is_no_slice_is_refused(text):
    with pytest.raises(errors.InvalidArgument, match="START:END"):
        TokenWindow.parse(text)


@pytest.mark.parametrize("window", [(2**31, 0), (1.5, 2), (True, 2)])
def test_a_window_is_of_integers_that_fit(window):
    with pytest.raises(errors.InvalidArgument, match="32 bits"):
        TokenWindow(*window)
