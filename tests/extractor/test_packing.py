from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_extractor.corpora import packing
from headrace_extractor.corpora.packing import Cursor, Packer, SpecialTokens, TokenBatch, count_rows
from headrace_extractor.corpora.recipe import Recipe, TokenWindow
from headrace_extractor.errors import FieldInvalid

BOS, EOS = 1, 2
SPECIAL = SpecialTokens(bos_id=BOS, eos_id=EOS, ids=frozenset({0}), prefix=(BOS,))
BERT = SpecialTokens(prefix=(8,), suffix=(9,))

relaxed = settings(deadline=None)  # The machine may be busy.

own_tokens = st.lists(st.integers(0, 9), max_size=30)
corpora = st.lists(own_tokens, max_size=12)
specials = st.builds(
    SpecialTokens,
    bos_id=st.sampled_from([None, BOS]),
    eos_id=st.just(EOS),
    ids=st.just(frozenset({0})),
    prefix=st.sampled_from([(), (BOS,), (7, 8)]),
    suffix=st.sampled_from([(), (EOS,), (3,)]),
    written=st.booleans(),
)


@st.composite
def windows(draw):
    try:
        return TokenWindow(start=draw(st.integers(-8, 8)), end=draw(st.integers(-8, 8)))
    except FieldInvalid:  # It holds no position.
        return None


@st.composite
def recipes(draw):
    context_size = draw(st.integers(2, 12))
    return Recipe(
        context_size=context_size,
        packing=draw(st.sampled_from(["packed", "one_document"])),
        attend_across_documents=draw(st.booleans()),
        # The longest prefix and suffix above take three tokens.
        bos=draw(st.sampled_from(["document", "none", *(["tokenizer"] if context_size > 3 else [])])),
        eos=draw(st.sampled_from(["none", "document"])),
        drop_special_tokens=draw(st.booleans()),
        drop_first_positions=draw(st.integers(0, context_size - 1)),
        batch_size=draw(st.integers(1, 3)),
        long_documents=draw(st.sampled_from(["", "split", "truncate"])),
        window=draw(st.none() | windows()),
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
def test_a_batch_is_made_again_from_its_own_start(lists, recipe, special):
    for batch in Packer(documents(*lists), recipe, special).batches():
        assert same(batch, next(Packer(documents(*lists), recipe, special).batches(batch.start)))


def sequences_the_slow_way(lists, recipe, special):
    """Returns sequences of (document, position, token, index in its piece), and how many own tokens were cut off."""
    again, suffix = [], []
    if recipe.bos == "tokenizer":
        again, suffix = list(special.prefix), [] if special.written else list(special.suffix)
    elif recipe.bos == "document" and special.bos_id is not None:
        again = [BOS]
    first = [] if recipe.bos == "tokenizer" and special.written else again
    tail = [*suffix, EOS] if recipe.eos == "document" and suffix[-1:] != [EOS] else suffix
    sequences, n_cut = [[]], 0
    for i, own in enumerate(lists):
        tokens = [*own, *tail] if own else []
        if recipe.long_documents == "truncate":
            room = recipe.context_size - len(first)
            n_cut += max(0, len(own) - (room - len(suffix)))
            tokens = [*own[: room - len(suffix)], *tail][:room] if own else []
        if recipe.packing == "one_document":
            sequences.append([])
        position, index, prefix = 0, 0, first
        n_stream = len(tokens)
        while tokens:
            if len(sequences[-1]) == recipe.context_size:
                sequences.append([])
                index, prefix = 0, first if len(tokens) == n_stream else again
            value = prefix[index] if index < len(prefix) else tokens.pop(0)
            sequences[-1].append((i, position, value, index))
            position, index = position + 1, index + 1
    return [sequence for sequence in sequences if sequence], n_cut


def kept_the_slow_way(sequences, recipe, special):
    """Returns the (document, position, token) that become rows, sequence by sequence."""
    dropped = special.ids if recipe.drop_special_tokens else set()
    streams = {}
    for document, position, *_ in itertools.chain(*sequences):
        streams.setdefault(document, []).append(position)

    def in_window(document, position):
        window = recipe.window or TokenWindow()
        return position in streams[document][slice(window.start, window.end or None)]

    candidates = [
        [each for each in sequence if each[3] >= recipe.drop_first_positions and in_window(each[0], each[1])]
        for sequence in sequences
    ]
    rows = [[each[:3] for each in sequence if each[2] not in dropped] for sequence in candidates]
    return rows, [bool(sequence) or recipe.window is None for sequence in candidates]


def read(batch, row, where=slice(None)):
    arrays = (batch.documents, batch.positions, batch.token_ids)
    return list(zip(*(array[row][where].tolist() for array in arrays), strict=True))


@relaxed
@given(corpora, recipes(), specials)
def test_sequences_and_rows_are_those_built_the_slow_way(lists, recipe, special):
    packer = Packer(documents(*lists), recipe, special)
    whole = list(packer.batches())
    sequences, n_cut = sequences_the_slow_way(lists, recipe, special)
    rows, needed = kept_the_slow_way(sequences, recipe, special)

    got = [(batch, row) for batch in whole for row in range(batch.token_ids.shape[0])]
    assert [read(*each) for each in got] == [
        [token[:3] for token in sequence] for sequence, wanted in zip(sequences, needed, strict=True) if wanted
    ]
    assert [read(batch, row, batch.keep[row]) for batch, row in got] == [
        kept for kept, wanted in zip(rows, needed, strict=True) if wanted
    ]
    counts = packer.count()
    assert counts.n_rows == sum(map(len, rows))
    assert counts.n_cut_off == n_cut
    assert (counts.n_documents_cut > 0) == (n_cut > 0)
    if all(needed):
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
@given(corpora, recipes(), specials, st.integers(min_value=1, max_value=40))
def test_a_count_ends_with_the_batch_that_has_the_rows_asked_for(lists, recipe, special, max_rows):
    rows = tokens = 0
    for batch in Packer(documents(*lists), recipe, special).batches():
        rows, tokens = rows + batch.n_rows, tokens + batch.token_ids.size
        if rows >= max_rows:
            break

    counts = Packer(documents(*lists), recipe, special).count(max_rows=max_rows)

    assert (counts.n_rows, counts.n_tokens) == (rows, tokens)


@relaxed
@given(corpora, recipes(), specials)
def test_position_ids_follow_the_pieces(lists, recipe, special):
    for batch in Packer(documents(*lists), recipe, special).batches():
        for row in range(batch.token_ids.shape[0]):
            index_in_piece = [
                i for _, piece in itertools.groupby(batch.documents[row].tolist()) for i, _ in enumerate(piece)
            ]
            expected = list(range(len(index_in_piece))) if recipe.attend_across_documents else index_in_piece
            assert batch.position_ids[row].tolist() == expected


@relaxed
@given(corpora, recipes(), specials)
def test_shapes_are_full_batches_then_a_smaller_one_then_the_short_sequence(lists, recipe, special):
    shapes = [batch.token_ids.shape for batch in Packer(documents(*lists), recipe, special).batches()]

    if recipe.packing == "one_document":
        assert all(n == 1 and width <= recipe.context_size for n, width in shapes)
        if recipe.long_documents == "truncate" and not recipe.window:
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


def test_truncated_documents_are_packed_one_behind_the_other():
    (batch,) = batches([[5, 6, 7, 8, 9], [3], [4, 4]], long_documents="truncate", context_size=4, batch_size=2)[:1]

    assert batch.token_ids.tolist() == [[BOS, 5, 6, 7], [BOS, 3, BOS, 4]]
    assert batch.n_cut_off == 2


def test_a_split_document_takes_sequences_of_its_own():
    first, last, other = batches([[5, 6, 7, 8], [9]], packing="one_document", long_documents="split", context_size=4)

    assert first.token_ids.tolist() == [[BOS, 5, 6, 7]]
    assert last.token_ids.tolist() == [[BOS, 8]]
    assert last.positions.tolist() == [[4, 5]]
    assert other.token_ids.tolist() == [[BOS, 9]]


def test_the_last_position_of_each_document_is_the_window_from_minus_one():
    window = TokenWindow(start=-1)
    found = batches([[5, 6], [], [7], [3, 4, 8, 9, 5, 6]], context_size=4, batch_size=1, window=window)

    assert [batch.token_ids[batch.keep].tolist() for batch in found] == [[6], [7], [6]]
    assert found[2].positions[found[2].keep].tolist() == [8]  # BOS 3, BOS 4 8 9, BOS 5 6


def test_sequences_without_rows_are_left_out_and_batches_stay_full():
    long = list(range(3, 9)) * 10
    found = batches([long, long], context_size=4, batch_size=2, bos="none", window=TokenWindow(start=0, end=2))

    assert [batch.token_ids.tolist() for batch in found] == [[[3, 4, 5, 6], [3, 4, 5, 6]]]
    assert count_rows(documents(long, long), Recipe(context_size=4, window=TokenWindow(end=2)), SPECIAL)[0] == 4


def test_a_window_that_finds_nothing_can_be_stopped(monkeypatch):
    monkeypatch.setattr(packing, "_MAX_LEFT_OUT", 8)
    packer = Packer(documents(*[[5, 6, 7]] * 100), Recipe(context_size=4, window=TokenWindow(start=9)), SPECIAL)
    asked = []

    assert list(packer.batches(stop=lambda: len(asked) == 3 or asked.append(0))) == []
    assert len(asked) == 3
    assert packer.count(stop=lambda: True).n_documents == 1
    assert packer.count().n_documents == 100


def test_counting_stops_when_told_and_says_how_far_it_came():
    packer = Packer(documents(*[[5, 6, 7]] * 10, []), Recipe(context_size=4, batch_size=1), SPECIAL)

    counts = packer.count(stop=lambda: True)

    assert (counts.n_documents, counts.n_rows) == (1, 4)
    assert (packer.count().n_documents, packer.count().n_rows) == (11, 40)


def test_counting_is_asked_to_stop_within_a_large_batch():
    packer = Packer(documents(*[[5, 6, 7]] * 10), Recipe(context_size=4, batch_size=1024), SPECIAL)
    so_far = list(packer.counts(pause=lambda: True))

    assert packer.count(stop=lambda: True).n_documents == 1
    assert [counts.n_rows for counts in so_far] == [*range(4, 44, 4), 40]
    assert so_far[-1] == packer.count()


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


def test_a_suffix_ends_the_document_and_stays_when_it_is_truncated():
    (packed,) = batches([[5, 6], [7]], special=BERT)
    first, last = batches([[3, 4, 5, 6], [7]], special=BERT, packing="one_document", context_size=4)
    split = batches([[3, 4, 5]], special=BERT, context_size=4, batch_size=1)

    assert packed.token_ids.tolist() == [[8, 5, 6, 9, 8, 7, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert (first.token_ids.tolist(), last.token_ids.tolist()) == ([[8, 3, 4, 9]], [[8, 7, 9]])
    assert (first.n_cut_off, last.n_cut_off) == (2, 0)
    assert [batch.token_ids.tolist() for batch in split] == [[[8, 3, 4, 5]], [[8, 9]]]


def test_a_prefix_of_two_tokens_precedes_every_piece():
    special = SpecialTokens(prefix=(8, 9))
    found = batches([[3, 4, 5], [6]], special=special, context_size=4, batch_size=1)

    assert [batch.token_ids.tolist() for batch in found] == [[[8, 9, 3, 4]], [[8, 9, 5, 8]], [[8, 9, 6]]]
    assert [batch.positions.tolist() for batch in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 0]], [[1, 2, 3]]]


def test_the_tokens_of_the_tokenizer_are_special_and_get_no_rows_if_asked():
    (batch,) = batches([[5, 6], [7]], special=BERT, drop_special_tokens=True)

    assert batch.token_ids[batch.keep].tolist() == [5, 6, 7]


def test_a_suffix_that_is_the_eos_token_is_not_followed_by_another():
    special = SpecialTokens(eos_id=EOS, suffix=(EOS,))

    assert batches([[5]], special=special, eos="document")[0].token_ids.tolist() == [[5, EOS]]
    assert batches([[5]], special=special, bos="none", eos="document")[0].token_ids.tolist() == [[5, EOS]]
    assert batches([[5]], special=special, bos="none")[0].token_ids.tolist() == [[5]]


def test_bos_alone_can_be_asked_for_and_nothing_at_all():
    special = SpecialTokens(bos_id=BOS, prefix=(8, BOS), suffix=(9,))

    assert batches([[5]], special=special)[0].token_ids.tolist() == [[8, BOS, 5, 9]]
    assert batches([[5]], special=special, bos="document")[0].token_ids.tolist() == [[BOS, 5]]
    assert batches([[5]], special=special, bos="none")[0].token_ids.tolist() == [[5]]


def test_a_context_without_room_for_a_text_is_refused():
    with pytest.raises(FieldInvalid, match="use at least 3") as caught:
        Packer([], Recipe(context_size=2), BERT)

    assert caught.value.field == "spec.recipe.context_size"


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
        ("storage_dtype", "int4"),
        ("attend_across_documents", 1),
        ("nonsense", 1),
        ("long_documents", "drop"),
        ("long_documents", None),
        ("chat_template", "yes"),
        ("window", 3),
        ("window", {"start": 1, "end": 1}),
        ("window", {"start": -1, "end": -2}),
        ("window", {"begin": 1}),
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


@pytest.mark.parametrize("window", [{"start": 2**31}, {"end": -(2**31)}, {"start": 1.0}])
def test_a_window_is_of_int32_numbers(window):
    with pytest.raises(FieldInvalid, match="integer"):
        Recipe.from_json({"window": window})


def test_later_fields_at_their_default_are_not_in_the_json():
    later = {"long_documents", "window", "chat_template", "skip_bad_documents", "max_documents"}
    old = {field.name for field in fields(Recipe)} - later

    assert set(Recipe().to_json()) == old
    assert set(Recipe(packing="one_document", long_documents="truncate", window=TokenWindow()).to_json()) == old
    assert Recipe(packing="one_document", long_documents="split").to_json()["long_documents"] == "split"
    assert Recipe(window=TokenWindow(start=-1)).to_json()["window"] == {"start": -1, "end": 0}
