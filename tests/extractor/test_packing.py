from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extractor_service.errors import FieldInvalid
from extractor_service.packing import Cursor, Packer, SpecialTokens, TokenBatch, count_rows
from extractor_service.recipe import Recipe

BOS, EOS = 1, 2
SPECIAL = SpecialTokens(bos_id=BOS, eos_id=EOS, ids=frozenset({0}))

relaxed = settings(deadline=None)  # The machine may be busy.

own_tokens = st.lists(st.integers(0, 9), max_size=30)
corpora = st.lists(own_tokens, max_size=12)
specials = st.builds(
    SpecialTokens, bos_id=st.sampled_from([None, BOS]), eos_id=st.just(EOS), ids=st.just(frozenset({0}))
)


@st.composite
def recipes(draw):
    context_size = draw(st.integers(2, 12))
    return Recipe(
        context_size=context_size,
        packing=draw(st.sampled_from(["packed", "one_document"])),
        attend_across_documents=draw(st.booleans()),
        bos=draw(st.sampled_from(["document", "none"])),
        eos=draw(st.sampled_from(["none", "document"])),
        drop_special_tokens=draw(st.booleans()),
        drop_first_positions=draw(st.integers(0, context_size - 1)),
        batch_size=draw(st.integers(1, 3)),
    )


def documents(*lists):
    return [np.array(tokens, dtype=np.int32) for tokens in lists]


def batches(lists, special=SPECIAL, **recipe) -> list[TokenBatch]:
    return list(Packer(documents(*lists), Recipe(**recipe), special).batches())


def same(a: TokenBatch, b: TokenBatch) -> bool:
    arrays = ("token_ids", "position_ids", "documents", "positions", "keep")
    return (a.start, a.next, a.n_cut_off) == (b.start, b.next, b.n_cut_off) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


@relaxed
@given(corpora, recipes(), specials)
def test_batches_from_any_boundary_are_the_tail_of_all_batches(lists, recipe, special):
    packer = Packer(documents(*lists), recipe, special)
    whole = list(packer.batches())

    for i, batch in enumerate(whole):
        tail = list(Packer(documents(*lists), recipe, special).batches(Cursor.from_json(batch.next.to_json())))
        assert len(tail) == len(whole) - i - 1
        assert all(same(a, b) for a, b in zip(tail, whole[i + 1 :], strict=True))
        assert batch.start == (whole[i - 1].next if i else Cursor())


@relaxed
@given(corpora, recipes(), specials)
def test_every_own_token_comes_once_in_order_unless_cut_off(lists, recipe, special):
    whole = list(Packer(documents(*lists), recipe, special).batches())
    stream = [
        (document, position, token)
        for batch in whole
        for document, position, token in zip(
            batch.documents.ravel().tolist(),
            batch.positions.ravel().tolist(),
            batch.token_ids.ravel().tolist(),
            strict=True,
        )
    ]

    # A stream built the slow way: each piece gets its BOS, the document its EOS.
    expected = []
    n_cut = 0
    room = recipe.context_size
    has_bos = recipe.bos == "document" and special.bos_id is not None
    for i, own in enumerate(lists):
        tokens = [*own, EOS] if own and recipe.eos == "document" else list(own)
        if recipe.packing == "one_document":
            cut = ([BOS] * has_bos + tokens)[: recipe.context_size] if own else []
            expected += [(i, position, token) for position, token in enumerate(cut)]
            n_cut += max(0, len(own) - (recipe.context_size - has_bos)) if own else 0
            continue
        position, at_piece_start = 0, True
        while tokens:
            value = BOS if has_bos and at_piece_start else tokens.pop(0)
            expected.append((i, position, value))
            position, at_piece_start = position + 1, False
            room -= 1
            if room == 0:
                room, at_piece_start = recipe.context_size, True
    assert stream == expected
    assert sum(batch.n_cut_off for batch in whole) == n_cut


@relaxed
@given(corpora, recipes(), specials)
def test_count_rows_is_exact(lists, recipe, special):
    whole = list(Packer(documents(*lists), recipe, special).batches())

    assert count_rows(documents(*lists), recipe, special) == (
        sum(batch.n_rows for batch in whole),
        sum(batch.token_ids.size for batch in whole),
    )


@relaxed
@given(corpora, recipes(), specials)
def test_position_ids_and_kept_positions_follow_the_pieces(lists, recipe, special):
    for batch in Packer(documents(*lists), recipe, special).batches():
        for row in range(batch.token_ids.shape[0]):
            index_in_piece = [
                i for _, piece in itertools.groupby(batch.documents[row].tolist()) for i, _ in enumerate(piece)
            ]
            expected = list(range(len(index_in_piece))) if recipe.attend_across_documents else index_in_piece
            assert batch.position_ids[row].tolist() == expected
            dropped = {0, EOS} | ({BOS} if special.bos_id else set()) if recipe.drop_special_tokens else set()
            kept = [
                i >= recipe.drop_first_positions and token not in dropped
                for i, token in zip(index_in_piece, batch.token_ids[row].tolist(), strict=True)
            ]
            assert batch.keep[row].tolist() == kept


@relaxed
@given(corpora, recipes(), specials)
def test_shapes_are_full_batches_then_a_smaller_one_then_the_short_sequence(lists, recipe, special):
    shapes = [batch.token_ids.shape for batch in Packer(documents(*lists), recipe, special).batches()]

    if recipe.packing == "one_document":
        assert all(n == 1 and width <= recipe.context_size for n, width in shapes)
        assert len(shapes) == sum(1 for own in lists if own)
        return
    if shapes and shapes[-1][1] < recipe.context_size:
        assert shapes.pop()[0] == 1
    assert all(width == recipe.context_size for _, width in shapes)
    assert all(n == recipe.batch_size for n, _ in shapes[:-1])


def test_a_long_document_goes_on_with_a_bos_and_positions_from_zero():
    first, last = batches([[5, 6, 7, 8, 9]], context_size=4, batch_size=1)

    assert first.token_ids.tolist() == [[BOS, 5, 6, 7]]
    assert last.token_ids.tolist() == [[BOS, 8, 9]]
    assert last.position_ids.tolist() == [[0, 1, 2]]
    assert last.positions.tolist() == [[4, 5, 6]]
    assert first.next == last.start == Cursor(document=0, token=3, position=4)


def test_packed_documents_share_a_sequence_and_restart_their_positions():
    (batch,) = batches([[5, 6], [], [7]], context_size=8, eos="document")

    assert batch.token_ids.tolist() == [[BOS, 5, 6, EOS, BOS, 7, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 2, 2, 2]]
    assert batch.next == Cursor(document=3)


def test_one_document_is_cut_to_the_context_and_the_cut_is_counted():
    short, long = batches([[5, 6], [7, 8, 9, 9, 9]], packing="one_document", context_size=4)

    assert short.token_ids.tolist() == [[BOS, 5, 6]]
    assert long.token_ids.tolist() == [[BOS, 7, 8, 9]]
    assert (short.n_cut_off, long.n_cut_off) == (0, 2)
    assert (
        Packer(documents([5, 6], [7, 8, 9, 9, 9]), Recipe(packing="one_document", context_size=4), SPECIAL)
        .count()
        .n_documents_cut
        == 1
    )


def test_counting_stops_when_told_and_says_how_far_it_came():
    packer = Packer(documents(*[[5, 6, 7]] * 10, []), Recipe(context_size=4, batch_size=1), SPECIAL)

    counts = packer.count(stop=lambda: True)

    assert (counts.n_documents, counts.n_rows) == (1, 4)
    assert (packer.count().n_documents, packer.count().n_rows) == (11, 40)


def test_special_tokens_and_first_positions_get_no_rows():
    (batch,) = batches([[5, 6, 0, 7]], drop_special_tokens=True, drop_first_positions=2, eos="document")

    assert batch.token_ids[batch.keep].tolist() == [6, 7]
    assert batch.positions[batch.keep].tolist() == [2, 4]


def test_a_token_id_beyond_all_special_ones_is_kept():
    (batch,) = batches([[2_000_000_000]], drop_special_tokens=True)

    assert batch.token_ids[batch.keep].tolist() == [2_000_000_000]


def test_a_corpus_of_empty_documents_makes_no_batch():
    assert batches([[], []]) == []
    assert count_rows(documents([], []), Recipe(), SPECIAL) == (0, 0)


def test_a_recipe_with_eos_needs_a_tokenizer_with_eos():
    with pytest.raises(FieldInvalid, match="no EOS token") as caught:
        Packer([], Recipe(eos="document"), SpecialTokens(bos_id=1))

    assert caught.value.field == "spec.recipe.eos"


def test_without_a_bos_token_none_is_inserted():
    (batch,) = batches([[5, 6]], special=SpecialTokens())

    assert batch.token_ids.tolist() == [[5, 6]]
    assert (
        batch.token_ids.dtype == batch.position_ids.dtype == batch.documents.dtype == batch.positions.dtype == np.int32
    )


def test_the_document_at_hand_is_fetched_once_a_piece_at_most():
    fetched = []

    class Watched:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            fetched.append(index)
            return np.arange(100, dtype=np.int32)

    list(Packer(Watched(), Recipe(context_size=8), SPECIAL).batches())

    assert fetched == [0, 1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_size", 1),
        ("context_size", 131_073),
        ("batch_size", 0),
        ("batch_size", 1025),
        ("batch_size", True),
        ("drop_first_positions", -1),
        ("drop_first_positions", 256),
        ("packing", "loose"),
        ("bos", ""),
        ("eos", "sometimes"),
        ("storage_dtype", "int8"),
        ("attend_across_documents", 1),
        ("nonsense", 1),
    ],
)
def test_a_recipe_out_of_range_names_its_field(field, value):
    with pytest.raises(FieldInvalid, match=field) as caught:
        Recipe.from_json({field: value})

    assert caught.value.field == f"spec.recipe.{field}"


@given(recipes())
@settings(max_examples=20, deadline=None)
def test_a_recipe_round_trips_through_json(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
