"""Quantizers: how weights are made small, and how small weights are loaded.

LLM.int8 and NF4 of bitsandbytes are built in. Other quantizers are plug-ins: a package offers, in the entry-point group
`headrace.quantizers` under the name of the quantization, a class without arguments that is a `Quantizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    core_model_loading,
)

from headrace_extractor.errors import ExtraMissing, FieldInvalid
from headrace_extractor.runner.models.accounting import check_weights, conversions_named
from headrace_extractor.runner.models.load_options import without_pooler
from headrace_extractor.runner.models.progress import OnProgress, bar_watched

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear8bitLt

GROUP = "headrace.quantizers"
NAMES = ("int8", "int4", "int2")

# Activations from here on are computed without quantization; the value of the LLM.int8 paper.
_OUTLIER_THRESHOLD = 6.0


class Quantizer(Protocol):
    """One way to quantize. All methods run in a runner, with torch imported."""

    def probe(self) -> None:
        """Raises ExtraMissing, with the package to install, if this quantizer can't work on this node."""

    def quantize(self, source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
        """Writes the base model in `source_path` to a new folder: config.json and safetensors."""

    def load(self, files_path: Path, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Loads a folder of `quantize`, with from_pretrained's `arguments`; returns the model and the loading info."""


def quantizer_for(quantization: str) -> Quantizer:
    """Returns the quantizer of that name, ready to use. Raises FieldInvalid and ExtraMissing."""
    if quantization not in NAMES:
        raise FieldInvalid(f"{quantization!r} is no quantization; use none, {', '.join(NAMES)}.", field="quantization")
    if built_in := _BUILT_IN.get(quantization):
        quantizer: Quantizer = built_in()
    elif plugged_in := next(iter(entry_points(group=GROUP, name=quantization)), None):
        quantizer = plugged_in.load()()
    else:
        raise ExtraMissing(
            f"No quantizer for {quantization} is installed on this node: install a package that offers the entry point "
            f"{quantization} of the group {GROUP}, or use int4 or int8, which are built in.",
            metadata={"extra": f"{GROUP}:{quantization}"},
        )
    quantizer.probe()
    return quantizer


class BitsAndBytes:
    """Base of the two built-in quantizers.

    Weights are quantized from the dtype they are stored in, on the CPU, so that the result depends neither on the
    device of a load nor on its dtype. Unquantized weights (embeddings, norms) keep their stored dtype in the files.
    """

    def probe(self) -> None:
        """Raises ExtraMissing without bitsandbytes and accelerate."""
        for name in ("bitsandbytes", "accelerate"):
            if find_spec(name) is None:
                raise ExtraMissing(
                    f"Quantized models need the package {name}; install headrace[extractor] on this node.",
                    metadata={"extra": "extractor", "package": name},
                )
        # It warns at every product that it computes in 16 bits.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def quantize(self, source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
        """Loads onto the CPU, which quantizes, and saves."""
        config = AutoConfig.from_pretrained(source_path, local_files_only=True, trust_remote_code=False)
        n_bytes = sum(path.stat().st_size for path in source_path.glob("*.safetensors"))
        # Bytes by the share of parameters loaded: which bytes of the files were read can't be seen from here.
        watched = bar_watched(core_model_loading, lambda done, total: on_progress(n_bytes * done // total, n_bytes))
        with conversions_named(), watched:
            model, report = AutoModel.from_pretrained(
                source_path,
                config=config,
                dtype="auto",
                device_map={"": "cpu"},
                quantization_config=self.config(),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **without_pooler(config),
            )
        check_weights(model, report)
        model.save_pretrained(target_path)

    def load(self, files_path: Path, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Loads saved weights as they are; the 4-bit product is computed in the dtype of the load."""
        config: PretrainedConfig = arguments["config"]
        saved = dict(config.quantization_config)
        if "bnb_4bit_compute_dtype" in saved:
            saved["bnb_4bit_compute_dtype"] = str(arguments["dtype"]).removeprefix("torch.")
        config.quantization_config = saved
        model, report = AutoModel.from_pretrained(files_path, **arguments)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # transformers leaves unquantized weights in their stored dtype.
                parameter.data = parameter.data.to(arguments["dtype"])
        return model, report

    def config(self) -> BitsAndBytesConfig:
        """Returns the settings that transformers quantizes by."""
        raise NotImplementedError


class Int8(BitsAndBytes):
    """LLM.int8 row by row: a scale for each row of weights and of activations; outlying activations stay as they are.

    bitsandbytes takes a whole column out of the product where one row of the batch has an outlier, so a row's numbers
    depend on the rows beside it. Here each row keeps its own outliers out, and depends on no other.
    """

    def load(self, files_path: Path, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Loads saved weights and makes the product of each row its own."""
        from bitsandbytes.nn import Linear8bitLt  # noqa: PLC0415 -- nodes without the package load other models

        model, report = super().load(files_path, arguments)
        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                module.state.threshold = 0.0
                module.forward = partial(_product_by_rows, module)
        return model, report

    def config(self) -> BitsAndBytesConfig:
        """Returns the settings of LLM.int8."""
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_OUTLIER_THRESHOLD)


def _product_by_rows(layer: Linear8bitLt, inputs: Tensor) -> Tensor:
    """Returns the layer's output for `[..., d_in]`: outlying elements times the weights, the others quantized."""
    outlying = inputs.abs() >= _OUTLIER_THRESHOLD
    columns = outlying.flatten(0, -2).any(0).nonzero().squeeze(1)
    outputs: Tensor = type(layer).forward(layer, inputs.masked_fill(outlying, 0))
    if len(columns) == 0:
        return outputs
    scales = cast("Tensor", layer.state.SCB).to(inputs.dtype) / 127
    weights = layer.weight[:, columns].to(inputs.dtype) * scales.unsqueeze(1)
    return outputs + torch.where(outlying, inputs, 0)[..., columns] @ weights.T


class Int4(BitsAndBytes):
    """NF4: sixteen levels spaced like a normal distribution, in blocks of 64 with doubly quantized scales."""

    def load(self, files_path: Path, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Loads saved weights and makes every machine compute the same product.

        On a CPU with AVX-512 for bfloat16 bitsandbytes would pack the weights again at the first forward pass and round
        their scales to 8 bits, for a kernel that took twice as long as the plain product in a trial.
        """
        model, report = super().load(files_path, arguments)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model, report

    def config(self) -> BitsAndBytesConfig:
        """Returns the settings of NF4; `load` replaces the compute dtype."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )


_BUILT_IN: dict[str, type[Int8 | Int4]] = {"int8": Int8, "int4": Int4}
