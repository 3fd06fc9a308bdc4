"""Converts recipes, and the dtypes of columns."""

from __future__ import annotations

from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import extraction_pb2
from headrace_extractor.corpora.recipe import BY_TOKENIZER, ONE_DOCUMENT, PACKED, SPLIT, TRUNCATE, Recipe, TokenWindow
from headrace_extractor.errors import FieldInvalid
from headrace_log.layout import Dtype

_LONG_DOCUMENTS = {
    extraction_pb2.LONG_DOCUMENTS_UNSPECIFIED: "",
    extraction_pb2.LONG_DOCUMENTS_SPLIT: SPLIT,
    extraction_pb2.LONG_DOCUMENTS_TRUNCATE: TRUNCATE,
}
_LONG_DOCUMENTS_BACK = {name: number for number, name in _LONG_DOCUMENTS.items()}
_BOS_BACK = {
    BY_TOKENIZER: extraction_pb2.BOS_POLICY_TOKENIZER,
    "document": extraction_pb2.BOS_POLICY_DOCUMENT,
    "none": extraction_pb2.BOS_POLICY_NONE,
}
_BOS = {number: name for name, number in _BOS_BACK.items()} | {extraction_pb2.BOS_POLICY_UNSPECIFIED: BY_TOKENIZER}


def bos_from_pb(number: int) -> str:
    """Returns the recipe's value; raises FieldInvalid."""
    for known, name in _BOS.items():
        if known == number:
            return name
    raise FieldInvalid("spec.recipe.bos is unknown.", field="spec.recipe.bos")


def long_documents_from_pb(number: int) -> str:
    """Returns the recipe's value; empty for unspecified, for which the recipe has a default. Raises FieldInvalid."""
    for known, name in _LONG_DOCUMENTS.items():
        if known == number:
            return name
    raise FieldInvalid("spec.recipe.long_documents is unknown.", field="spec.recipe.long_documents")


def long_documents_to_pb(name: str) -> extraction_pb2.LongDocuments.ValueType:
    """Inverse of `long_documents_from_pb`."""
    return _LONG_DOCUMENTS_BACK[name]


def window_from_pb(message: extraction_pb2.Recipe) -> TokenWindow | None:
    """Returns the recipe's window if it has one; raises FieldInvalid."""
    if not message.HasField("window"):
        return None
    return TokenWindow(start=message.window.start, end=message.window.end)


def window_to_pb(window: TokenWindow | None) -> extraction_pb2.TokenWindow | None:
    """Inverse of `window_from_pb`."""
    return None if window is None else extraction_pb2.TokenWindow(start=window.start, end=window.end)


DTYPES = {
    Dtype.FLOAT32: dtype_pb2.DTYPE_FLOAT32,
    Dtype.FLOAT16: dtype_pb2.DTYPE_FLOAT16,
    Dtype.BFLOAT16: dtype_pb2.DTYPE_BFLOAT16,
    Dtype.INT32: dtype_pb2.DTYPE_INT32,
    Dtype.INT8: dtype_pb2.DTYPE_INT8,
    Dtype.FLOAT8_E4M3: dtype_pb2.DTYPE_FLOAT8_E4M3,
}


_DTYPES_BACK = {value: key for key, value in DTYPES.items()} | {dtype_pb2.DTYPE_UNSPECIFIED: Dtype.FLOAT32}


def recipe_from_pb(message: extraction_pb2.Recipe) -> Recipe:
    """Zero and unspecified take the contract's defaults; raises FieldInvalid."""
    defaults = Recipe()
    if message.storage_dtype not in _DTYPES_BACK:
        raise FieldInvalid("spec.recipe.storage_dtype is unknown.", field="spec.recipe.storage_dtype")
    return Recipe(
        context_size=message.context_size or defaults.context_size,
        packing=ONE_DOCUMENT if message.packing == extraction_pb2.PACKING_ONE_DOCUMENT else PACKED,
        attend_across_documents=message.attend_across_documents,
        bos=bos_from_pb(message.bos),
        eos="document" if message.eos == extraction_pb2.EOS_POLICY_DOCUMENT else "none",
        drop_special_tokens=message.drop_special_tokens,
        drop_first_positions=message.drop_first_positions,
        batch_size=message.batch_size or defaults.batch_size,
        storage_dtype=str(_DTYPES_BACK[message.storage_dtype]),
        long_documents=long_documents_from_pb(message.long_documents),
        window=window_from_pb(message),
        chat_template=message.chat_template,
        skip_bad_documents=message.skip_bad_documents,
        max_documents=message.max_documents,
    )


def recipe_to_pb(recipe: Recipe) -> extraction_pb2.Recipe:
    """Every field filled in."""
    one = recipe.packing == ONE_DOCUMENT
    return extraction_pb2.Recipe(
        context_size=recipe.context_size,
        packing=extraction_pb2.PACKING_ONE_DOCUMENT if one else extraction_pb2.PACKING_PACKED,
        attend_across_documents=recipe.attend_across_documents,
        bos=_BOS_BACK[recipe.bos],
        eos=extraction_pb2.EOS_POLICY_DOCUMENT if recipe.eos == "document" else extraction_pb2.EOS_POLICY_NONE,
        drop_special_tokens=recipe.drop_special_tokens,
        drop_first_positions=recipe.drop_first_positions,
        batch_size=recipe.batch_size,
        storage_dtype=DTYPES[Dtype(recipe.storage_dtype)],
        long_documents=long_documents_to_pb(recipe.long_documents),
        window=window_to_pb(recipe.window),
        chat_template=recipe.chat_template,
        skip_bad_documents=recipe.skip_bad_documents,
        max_documents=recipe.max_documents,
    )
