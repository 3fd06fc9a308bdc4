"""What transformers leaves out of GGUF files: all parts but the first, and the scaling of a Llama's rotations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import PretrainedConfig

from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.progress import OnProgress
from headrace_models.gguf import parts_of

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_ARCHITECTURE = "general.architecture"
ROTATIONS = "rope_freqs.weight"
_GATES, _UPS = ".ffn_gate_exps.", ".ffn_up_exps."
# The writer makes these itself, or the whole file has none of them; it aligns as files without an alignment are.
_DROPPED = (_ARCHITECTURE, _COUNT, _NUMBER, _TENSORS, "general.alignment")


@contextmanager
def whole_file(source_path: Path, scratch: Path, on_bytes: OnProgress) -> Iterator[Path]:
    """Yields the file itself, or one file made of its parts, which is removed behind the block.

    The whole file is written below `scratch`; `on_bytes` gets the bytes of tensors written so far and in all. Raises
    ModelUnsupported if parts are absent or are not those of one file, and LoadFailed if tensors are.
    """
    first = GGUFReader(source_path)
    n_parts = _number(first, _COUNT) or 1
    if n_parts == 1:
        del first
        yield source_path
        return
    try:
        parts = parts_of(source_path)
    except ValueError as exc:
        raise ModelUnsupported(f"{exc}, and register that.") from exc
    if len(parts) != n_parts:
        raise ModelUnsupported(
            f"{source_path.name} is one of {n_parts} parts; name them NAME-00001-of-{n_parts:05d}.gguf and so on, as "
            "llama.cpp does, and register the first."
        )
    if absent := [part.name for part in parts if not part.is_file()]:
        raise ModelUnsupported(f"{source_path.name} lacks {', '.join(absent[:3])}; put all its parts beside it.")
    readers = [first, *(GGUFReader(part) for part in parts[1:])]
    for index, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        if (_number(reader, _COUNT), _number(reader, _NUMBER)) != (n_parts, index):
            raise ModelUnsupported(f"{part.name} is not part {index + 1} of {n_parts}; fetch the parts again.")
    n_tensors, n_expected = sum(len(reader.tensors) for reader in readers), _number(first, _TENSORS)
    if n_tensors != n_expected:
        raise LoadFailed(f"The {n_parts} parts hold {n_tensors} tensors of {n_expected}; fetch them again.")
    whole = scratch / "whole.gguf"
    try:
        _join(readers, whole, on_bytes)
        del first, reader
        readers.clear()  # They map the parts.
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def absent_halves(path: Path) -> list[str]:
    """Returns the tensors of experts that a file lacks beside their other halves; transformers takes zeros for them.

    A file of experts without gates has no such halves.
    """
    names = {tensor.name for tensor in GGUFReader(path).tensors}
    gates = {name for name in names if _GATES in name}
    ups = {name for name in names if _UPS in name} if gates else set()
    return sorted(
        {name.replace(_GATES, _UPS) for name in gates} - ups | {name.replace(_UPS, _GATES) for name in ups} - gates
    )


def scale_rotations(config: PretrainedConfig, path: Path) -> bool:
    """Puts the tensor ROTATIONS of a file into a config, where transformers leaves it out; False if it has no place.

    Newer Llamas turn each pair of dimensions more slowly by a factor of its own; their files hold the factors alone.
    LongRoPE with equal factors for all lengths divides by the same numbers.
    """
    factors = next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == ROTATIONS).tolist()
    known = getattr(config, "rope_parameters", None)
    n_pairs = getattr(config, "head_dim", 0) // 2
    if not isinstance(known, dict) or known.get("rope_type") != "default" or len(factors) != n_pairs:
        return False
    config.rope_parameters = {
        **known,
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    return True


def _join(readers: list[GGUFReader], target: Path, on_bytes: OnProgress) -> None:
    """Writes the metadata of the first part and the tensors of all to one file."""
    first = readers[0]
    writer = GGUFWriter(target, str(first.fields[_ARCHITECTURE].contents()), endianess=first.endianess)
    for name, field in first.fields.items():
        if name in _DROPPED or name.startswith("GGUF."):
            continue
        kind, value = field.types[0], field.contents()
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        if value != []:  # An array without elements has no kind of element, which the writer would need.
            writer.add_key_value(name, value, kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.n_bytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done_bytes, total_bytes = 0, sum(int(tensor.n_bytes) for tensor in tensors)
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=first.endianess)
        done_bytes += tensor.n_bytes
        on_bytes(done_bytes, total_bytes)
    writer.close()


def _number(reader: GGUFReader, name: str) -> int:
    """Returns a number of the metadata; 0 if the file has none of that name."""
    field = reader.get_field(name)
    value = field.contents() if field is not None else 0
    return value if isinstance(value, int) else 0
