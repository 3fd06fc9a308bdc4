"""Judges the hookpoints of an architecture from outside: saved files, the runner's own loading, values by other hooks.

The residual stream is compared with transformers' `hidden_states` of the model before it was saved. Every other site is
judged by what it is: the vectors that attention and MLP add are a sum, attention mixes tokens, the MLP does not, and
nothing of them is left once the product with their last projection is taken away. Packed documents are compared with
each document alone. None of it shares code with the runner.
"""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np

from fix_architectures import N_SEQUENCE, documents, random_model, small_config
from fix_runner import load, read_rows, run_command
from fix_verdict_table import AT_REGISTRATION, EXACT, REFUSED, ROUNDED, Verdict
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.writer import DocumentWriter
from headrace_extractor.node.runner_protocol import Extract
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest, set_id_of

# Far above rounding in float32, which four layers of noise multiply, and below the smallest leak that was seen.
_MOST = 2e-4
_SHORT = 4  # Inkling has a convolution over so many tokens behind its MLP.
_PARTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Wrong(Exception):
    """A hookpoint has values that are not what its name says."""


def judge(model_type, folder, **changes):
    """Returns the verdict on a small model of a type; raises Wrong for a value that is not what its name says."""
    import torch
    from transformers import AutoModel

    from headrace_extractor.errors import FieldInvalid, LoadFailed, ModelUnsupported
    from headrace_extractor.runner.hooks.binding import anatomy_of
    from headrace_models.unsupported import why_unsupported

    config = small_config(model_type, **changes)
    why = why_unsupported(config.to_dict())
    if why:
        return Verdict(model_type=model_type, alone=AT_REGISTRATION, why=why)
    saved = random_model(config)
    saved.save_pretrained(folder)
    try:
        loaded = load(folder)
        points = [point for point in anatomy_of(loaded.model).points.values() if not point.unavailable]
        rows = _extracted(loaded, folder, points, "one_document")
    except (ModelUnsupported, LoadFailed) as exc:
        return Verdict(model_type=model_type, alone=REFUSED, why=str(exc))
    ends = np.cumsum([len(document) for document in documents()])
    alone = [
        {name: values[end - len(document) : end] for name, values in rows.items()}
        for document, end in zip(documents(), ends, strict=True)
    ]
    # The class without head and its files, by plain transformers: bits depend on how weights lie in memory.
    attention = None if config.sub_configs else loaded.model.config._attn_implementation
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    bits_are_equal = [_check_stream(reference, *each) for each in zip(documents(), alone, strict=True)]
    _check_stream(saved, documents()[0], alone[0], whole=True)
    _check_places(reference, points, alone[0])
    _check_sublayers(reference, {point.name: point for point in points}, alone[0])
    if anatomy_of(loaded.model).catalogue.family:
        _check_heads(reference, alone[0])
    sites = tuple(dict.fromkeys(name.split(".", 2)[-1] if name.startswith("blocks.") else name for name in rows))
    verdict = Verdict(
        model_type=model_type, alone=EXACT if all(bits_are_equal) else ROUNDED, packed=ROUNDED, sites=sites
    )
    try:
        packed = _extracted(loaded, folder, points, "packed")
    except FieldInvalid:  # It names the recipe that can be used.
        return replace(verdict, packed=REFUSED)
    except ModelUnsupported as exc:
        raise Wrong(f"only the receipt saw that packed rows are wrong: {exc}") from exc
    _check_sight(reference)
    for name, values in packed.items():
        if (error := apart(values, rows[name])) > _MOST:
            raise Wrong(f"{name} packed is off by {error:.2g}")
    return verdict


def _extracted(loaded, folder, points, packing):
    """Extracts all hookpoints of the documents in this process; returns their rows as tensors by hookpoint."""
    import torch

    corpus, target = (folder.with_name(f"{folder.name}-{kind}-{packing}") for kind in ("corpus", "set"))
    with DocumentWriter(corpus, tokenized=True) as writer:
        for document in documents():
            writer.add(document.astype("<i4").tobytes())
        writer.finish(corpus_id=corpus.name, origin="test", create_time=0.0)
    recipe = Recipe(context_size=N_SEQUENCE, batch_size=2, packing=packing, bos="none")
    columns = [
        ColumnSpec(name=point.name, dtype=Dtype.FLOAT32, width=point.width, shape=point.shape) for point in points
    ]
    identity = {"recipe": recipe.to_json()}
    manifest = Manifest(
        set_id=set_id_of(identity), identity=identity, columns=(*PROVENANCE, *columns), segment_rows=1000
    )
    manifest.save(target)
    events = run_command(Extract(set_id="x", set_path=str(target), corpus_path=str(corpus)), loaded)
    rows = read_rows(target, events[-1].n_rows)
    assert rows["token_id"].tolist() == np.concatenate(documents()).tolist()
    return {point.name: torch.from_numpy(rows[point.name].copy()) for point in points}


def _check_sight(reference):
    """Documents in one sequence see one another by far more than rounding, so that the comparison says something."""
    import torch

    first, second = documents()[:2]
    with torch.inference_mode():
        joined, alone = (
            reference(input_ids=torch.from_numpy(ids)[None], use_cache=False)[0][0]
            for ids in (np.concatenate([first, second]), second)
        )
    if apart(joined[len(first) :], alone) < 50 * _MOST:
        raise Wrong("documents hardly see one another in one sequence: the model needs more noise")


def apart(found, expected):
    """Returns the largest distance of a row, relative to the row."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)).max())


def _check_stream(reference, document, rows, *, whole=False):
    """Compares the residual stream with `hidden_states`; returns whether all bits are equal. `whole`: with its head."""
    import torch

    n_layers = 1 + max(int(name.split(".")[1]) for name in rows if name.startswith("blocks."))
    ids = torch.from_numpy(document)[None]
    with torch.inference_mode(), _inputs_of_all(reference) as entered:
        output = reference(input_ids=ids, use_cache=False, output_hidden_states=True)
    exact = True
    states = getattr(output, "hidden_states", None)
    pre, post = ([rows[f"blocks.{layer}.hook_resid_{side}"] for layer in range(n_layers)] for side in ("pre", "post"))
    if not all(bool(each.isfinite().all()) for each in (*pre, *post)):
        raise Wrong("rows are not finite")
    if states and len(states) in (n_layers, n_layers + 1):
        # Some models' code appends a state behind each block, others before it.
        before = _differences(pre, states)
        behind = _differences(post, states)
        if min(max(before), max(behind)) > _MOST / 100:
            raise Wrong(f"the residual stream differs from hidden_states by {min(max(before), max(behind)):.2g}")
        exact &= min(max(before), max(behind)) == 0
    for left, entering in zip(post, pre[1:], strict=False):
        if not torch.equal(left, entering):
            raise Wrong("what leaves a block is not what enters the next")
    # The last block's output is what the final norm or projection takes, or the output of the network.
    final = entered if whole else [*entered, output[0]]
    closest = min(apart(each[0], post[-1]) for each in final if each.shape == (1, *post[-1].shape))
    if closest > _MOST / 100:
        raise Wrong("nothing behind the last block takes its output")
    return exact and closest == 0


def _differences(rows, states):
    return [apart(state[0], row) for row, state in zip(rows, states, strict=False)][: len(rows)]


@contextmanager
def _inputs_of_all(model):
    """Yields a list that is filled with the tensors that each module is given."""
    import torch

    entered = []

    def keep(_module, args, kwargs):
        values = (*args, *kwargs.values())
        entered.extend(each.clone() for each in values if isinstance(each, torch.Tensor) and each.is_floating_point())

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _check_places(reference, points, rows):
    """Compares every hookpoint with the tensor that a hook of this file finds at the module that it names."""
    import torch

    cut = defaultdict(list)
    with torch.inference_mode(), _tensors_at(reference, [point.module for point in points]) as seen:
        reference(input_ids=torch.from_numpy(documents()[0])[None], use_cache=False)
    for point in points:
        found, whole = rows[point.name], seen[point.module].reshape(len(rows[point.name]), -1)
        match type(point.take).__name__:
            case "Cut":
                cut[point.module].append(found)
            case "Normalized":
                if ((found.double().pow(2).mean(1) - 1).abs() > 1e-3).any():
                    raise Wrong(f"{point.name} is not normalised")
            case "Scaled":
                if apart(found, whole * point.take.factor) > 1e-6:
                    raise Wrong(f"{point.name} is not the scaled output of its module")
            case _:
                if apart(found, whole) > 1e-6:
                    raise Wrong(f"{point.name} is not what passes its module")
    for module, parts in cut.items():
        # Together they are the whole tensor, in another order; MLPs of GLM keep the half behind the gate to themselves.
        found, whole = torch.cat(parts, 1).sort(1).values, seen[module].reshape(len(parts[0]), -1)
        halves = [whole, whole.chunk(2, -1)[0]]
        if not any(found.shape == half.shape and apart(found, half.sort(1).values) < 1e-6 for half in halves):
            raise Wrong(f"the parts of {module} are not its tensor")


@contextmanager
def _tensors_at(model, places):
    """Yields a dict that is filled with the tensor at each place, `<path>:in` or `:out`."""

    seen, handles = {}, []

    def keep(place, values):
        seen[place] = _first(values).clone()

    for place in places:
        path, _, side = place.partition(":")
        module = model.get_submodule(path)
        if side == "in":
            enter = partial(lambda place, _m, args, kwargs: keep(place, (*args, *kwargs.values())), place)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        else:
            leave = partial(
                lambda place, _m, _a, out: keep(place, out if isinstance(out, tuple | list) else [out]), place
            )
            handles.append(module.register_forward_hook(leave))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_sublayers(reference, places, rows):
    """Checks in every block what attention and MLP add, and what enters their last projections."""
    n_layers = 1 + max(int(name.split(".")[1]) for name in rows if name.startswith("blocks."))
    for layer in range(n_layers):
        pre, attn, mid, mlp, post = (rows.get(f"blocks.{layer}.hook_{part}") for part in _PARTS)
        if attn is not None and mlp is not None and apart(pre + attn + mlp, post) > 1e-5:
            raise Wrong(f"block {layer} is no sum")
        if attn is not None and mid is not None and apart(pre + attn, mid) > 1e-5:
            raise Wrong(f"resid_mid of block {layer} is no sum")
        _check_mixing(reference, places, layer)
        for site, part in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
            if f"blocks.{layer}.{site}" in places:
                _check_projection(reference, places, layer, site, part)


def _check_heads(reference, rows):
    """Compares values and results of heads with those that pass transformers' attention function.

    Queries and keys are rotated and normalised before they come there. In architectures that the catalogue does not
    know, a gate or a norm may follow, whose output enters the last projection.
    """
    import torch
    from transformers import AttentionInterface

    functions = AttentionInterface._global_mapping
    calls, sdpa = [], functions["sdpa"]

    def record(module, query, key, value, *args, **kwargs):
        result = sdpa(module, query, key, value, *args, **kwargs)
        calls.append((value[0].transpose(0, 1), result[0][0].flatten(1)))
        return result

    with torch.inference_mode(), mock.patch.dict(functions, {"sdpa": record}):
        reference(input_ids=torch.from_numpy(documents()[0])[None], use_cache=False)
    layers = sorted({int(name.split(".")[1]) for name in rows if name.startswith("blocks.")})
    if len(calls) != len(layers):
        return  # Attention of its own, or blocks of other kinds between.
    for layer, (value, result) in zip(layers, calls, strict=True):
        z, v = rows.get(f"blocks.{layer}.attn.hook_z"), rows.get(f"blocks.{layer}.attn.hook_v")
        if z is not None and apart(z, result) > 1e-5:
            raise Wrong(f"attn.hook_z of block {layer} is not what the heads give")
        if v is not None:
            n_repeats = value.shape[1] * value.shape[2] // v.shape[1]
            if apart(v, value[:, ::n_repeats]) > 1e-5:
                raise Wrong(f"attn.hook_v of block {layer} is not what the heads take")


def _module(reference, place):
    path, _, side = place.module.partition(":")
    return reference.get_submodule(path), side


def _several(values):
    return values if isinstance(values, tuple | list) else (values,)


def _first(values):
    import torch

    return next(each for each in _several(values) if isinstance(each, torch.Tensor))


def _replaced(values, value):
    """Returns a module's output with its first tensor replaced."""
    return (value, *values[1:]) if isinstance(values, tuple) else value


def _run(reference, document, *hooks):
    """Runs the network with hooks: pairs of a module and a function of its output."""
    import torch

    with ExitStack() as stack:
        for module, function in hooks:
            handle = module.register_forward_hook(lambda _m, _a, output, function=function: function(output))
            stack.callback(handle.remove)
        reference(input_ids=torch.from_numpy(document)[None], use_cache=False)


def _check_mixing(reference, places, layer):
    """Attention's part of a token depends on earlier tokens; the MLP's part does so through attention alone."""
    import torch

    names = [f"blocks.{layer}.hook_{part}" for part in ("attn_out", "mlp_out")]
    if not all(name in places for name in names):
        return
    document = documents()[-1]
    block = reference.get_submodule(places[f"blocks.{layer}.hook_resid_pre"].module.partition(":")[0])
    (attn, _), (mlp, _) = (_module(reference, places[name]) for name in names)
    seen = {}

    def enter(_module, args, kwargs):
        seen["x"] = _first((*args, kwargs.get("hidden_states"))).detach().clone().requires_grad_()
        if args and isinstance(args[0], torch.Tensor):
            return (seen["x"], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": seen["x"]}

    def keep_attn(output):
        seen["attn"] = _first(output)
        return _replaced(output, seen["attn"].detach())

    def keep_mlp(output):
        seen["mlp"] = _first(output).clone()

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        _run(reference, document, (attn, keep_attn), (mlp, keep_mlp))
    finally:
        handle.remove()
    of_attn, of_mlp = (_influence(seen[part], seen["x"], len(document)) for part in ("attn", "mlp"))
    if not of_attn[:-1].norm() > 1e-4 * of_attn.norm():
        raise Wrong(f"attn_out of block {layer} mixes no tokens")
    if of_mlp[:-_SHORT].norm() > 1e-6 * of_mlp.norm():
        raise Wrong(f"mlp_out of block {layer} mixes tokens")


def _influence(value, x, n_tokens):
    """Returns how the last token of a value depends on each token of x: `[T, D]`."""
    import torch

    last = value.reshape(n_tokens, -1)[-1]
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), x, allow_unused=True, retain_graph=True)
    return torch.zeros(n_tokens, 1) if gradient is None else gradient.reshape(n_tokens, -1)


def _check_projection(reference, places, layer, site, part):
    """A linear layer takes the site, and without its product the part is the same for all tokens."""
    import torch

    document = documents()[-1]
    projection, side = _module(reference, places[f"blocks.{layer}.{site}"])
    weight = getattr(projection, "weight", None)
    if side != "in" or weight is None or weight.dim() != 2:
        raise Wrong(f"{site} of block {layer} enters no projection")
    seen = {}

    def take_away(output):
        return _replaced(output, torch.zeros_like(_first(output)))

    def keep(output):
        seen["part"] = _first(output).detach().reshape(len(document), -1).clone()

    name = f"blocks.{layer}.{part}"
    # Without a site for the part: the module that holds the projection.
    whole = _module(reference, places[name])[0] if name in places else projection
    with torch.inference_mode():
        _run(reference, document, (projection, take_away), (whole, keep))
    if (seen["part"] - seen["part"][:1]).abs().max() > 1e-6:
        raise Wrong(f"{part} of block {layer} is more than the product with {site}")
