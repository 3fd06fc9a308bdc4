"""Which command a build becomes."""

from __future__ import annotations

from fix_extractor import model_info
from headrace_extractor.node.builds import command_of
from headrace_extractor.node.runner_protocol import Convert
from headrace_extractor.node.values import Build


def test_a_folder_without_quantization_is_converted_as_it_lies():
    folder = "/store/tiny-0123456789ab"
    build = Build(model=model_info(""), target_path=f"{folder}-safe", source_path=folder)

    assert command_of(build) == Convert(source_path=build.source_path, target_path=build.target_path)
