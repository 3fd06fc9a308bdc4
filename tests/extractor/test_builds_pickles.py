"""The command that a build becomes."""

from __future__ import annotations

from dataclasses import replace

from fix_extractor import model_info
from headrace_extractor.node.builds import command_of
from headrace_extractor.node.runner_protocol import Convert
from headrace_extractor.node.values import Build, BuildKind


def test_a_folder_without_quantization_is_converted_as_it_lies():
    folder = "/store/tiny-0123456789ab"
    build = Build(
        kind=BuildKind.CONVERT_PICKLED, model=model_info(""), target_path=f"{folder}-safe", source_path=folder
    )

    assert command_of(build) == Convert(source_path=build.source_path, target_path=build.target_path)


def test_the_pickles_of_a_model_to_quantize_are_converted_first():
    model = replace(model_info(""), quantization="int8")
    build = Build(kind=BuildKind.CONVERT_PICKLED, model=model, target_path="/safe", source_path="/pickled")

    assert command_of(build) == Convert(source_path="/pickled", target_path="/safe")


def test_a_gguf_file_is_converted_from_where_the_model_has_it():
    model = replace(model_info(""), quantization="int8", gguf_path="/files/m.gguf")
    build = Build(kind=BuildKind.CONVERT_GGUF, model=model, target_path="/safe")

    assert command_of(build) == Convert(source_path="/files/m.gguf", target_path="/safe")
