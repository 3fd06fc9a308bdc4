"""Between messages about recipes and values."""

from __future__ import annotations

from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import extraction_pb2 as extraction_pb
from headrace_client import values as v
from headrace_client.rpc.convert.common import dtype_from_pb
from headrace_client.rpc.convert.enums import choice_of

# Unspecified is not among them: the packing decides then, on both sides.
_LONG_DOCUMENTS = {
    extraction_pb.LONG_DOCUMENTS_SPLIT: v.LongDocuments.SPLIT,
    extraction_pb.LONG_DOCUMENTS_TRUNCATE: v.LongDocuments.TRUNCATE,
}


def recipe_from_pb(pb: extraction_pb.Recipe) -> v.Recipe:
    """Reads a recipe, defaults filled in."""
    return v.Recipe(
        context_size=pb.context_size or 256,
        packing=choice_of(extraction_pb.Packing, "PACKING_", pb.packing, v.Packing, v.Packing.PACKED),
        attend_across_documents=pb.attend_across_documents,
        bos=choice_of(extraction_pb.BosPolicy, "BOS_POLICY_", pb.bos, v.BosPolicy, v.BosPolicy.TOKENIZER),
        eos=choice_of(extraction_pb.EosPolicy, "EOS_POLICY_", pb.eos, v.TokenPolicy, v.TokenPolicy.NONE),
        drop_special_tokens=pb.drop_special_tokens,
        drop_first_positions=pb.drop_first_positions,
        batch_size=pb.batch_size or 4,
        storage_dtype=dtype_from_pb(pb.storage_dtype, v.Dtype.FLOAT32),
        long_documents=_LONG_DOCUMENTS.get(pb.long_documents),
        window=v.TokenWindow(pb.window.start, pb.window.end) if pb.HasField("window") else None,
        chat_template=pb.chat_template,
        skip_bad_documents=pb.skip_bad_documents,
        max_documents=pb.max_documents,
    )


def recipe_to_pb(recipe: v.Recipe) -> extraction_pb.Recipe:
    """Builds a recipe."""
    window, long_documents = recipe.window, recipe.long_documents
    assert long_documents is not None, "filled in when the recipe was made"
    assert not isinstance(window, tuple), "made a window when the recipe was made"
    return extraction_pb.Recipe(
        context_size=recipe.context_size,
        packing=extraction_pb.Packing.Value(f"PACKING_{v.Packing(recipe.packing).name}"),
        attend_across_documents=recipe.attend_across_documents,
        bos=extraction_pb.BosPolicy.Value(f"BOS_POLICY_{v.BosPolicy(recipe.bos).name}"),
        eos=extraction_pb.EosPolicy.Value(f"EOS_POLICY_{v.TokenPolicy(recipe.eos).name}"),
        drop_special_tokens=recipe.drop_special_tokens,
        drop_first_positions=recipe.drop_first_positions,
        batch_size=recipe.batch_size,
        storage_dtype=dtype_pb2.Dtype.Value(f"DTYPE_{v.Dtype(recipe.storage_dtype).name}"),
        long_documents=extraction_pb.LongDocuments.Value(f"LONG_DOCUMENTS_{v.LongDocuments(long_documents).name}"),
        window=None if window is None else extraction_pb.TokenWindow(start=window.start, end=window.end),
        chat_template=recipe.chat_template,
        skip_bad_documents=recipe.skip_bad_documents,
        max_documents=recipe.max_documents,
    )
