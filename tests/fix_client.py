# ruff: noqa: N802 - the methods have the contract's names.
"""Scripted servers for the client's tests: the generated servicers on real sockets, with faults on request."""

import time
from collections import defaultdict, deque
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.extractor.v1 import corpus_service_pb2_grpc as corpora_grpc
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace.registry.v1 import activation_set_service_pb2 as sets_pb
from headrace.registry.v1 import activation_set_service_pb2_grpc as sets_grpc
from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2 as residencies_pb
from headrace.registry.v1 import residency_service_pb2_grpc as residencies_grpc
from headrace_client import HeadraceClient

from activation_log import frames
from activation_log.order import Sequential, Shard, Shuffled

HOOKPOINT = "blocks.1.hook_resid_post"
SECOND = "blocks.0.hook_resid_pre"
PROVENANCE = ("token_id", "document", "position")
EXTRACTION_ID = "ex-1"


def abort(context, code, reason="", message="no", *, metadata=None, retry_after_s=None, fields=None):
    """Ends a call as the servers do: a google.rpc.Status with details; without a reason, as gRPC itself does."""
    if not reason:
        context.abort(code, message)
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="headrace.dev", metadata=metadata or {})]
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(retry)
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=name, description=text) for name, text in fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    packed = []
    for detail in details:
        one = AnyMessage()
        one.Pack(detail)
        packed.append(one)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    context.abort_with_status(rpc_status.to_status(status))


class Scripted:
    """Base of the scripted servicers: remembers requests and fails where told.

    `fail["Method"]` holds keyword arguments of `abort`, one for each call to fail; `calls["Method"]` the requests seen.
    """

    def __init__(self):
        self.calls = defaultdict(list)
        self.fail = defaultdict(deque)
        self.metadata = defaultdict(list)
        self.hang = set()

    def note(self, method, request, context):
        self.calls[method].append(request)
        self.metadata[method].append(dict(context.invocation_metadata()))
        while method in self.hang and context.is_active():
            time.sleep(0.01)
        if self.fail[method]:
            abort(context, **self.fail[method].popleft())


def unavailable(reason="RUNNER_LOST"):
    return {"code": grpc.StatusCode.UNAVAILABLE, "reason": reason, "message": "gone", "retry_after_s": 0.01}


@dataclass
class Fault:
    """What happens to one connection after `after` chunks.

    `cut` aborts with `status`; `hang` says nothing more; `gap` leaves a chunk out; `overlap` sends one twice; `no_end`
    ends without the end message; `other_set` announces another set.
    """

    kind: str
    after: int = 0
    status: dict = field(default_factory=unavailable)


class ScriptedExtractor(Scripted, service_grpc.ExtractionServiceServicer, corpora_grpc.CorpusServiceServicer):
    """One extraction of `n_rows` rows, whose values follow from the row number alone."""

    def __init__(self, n_rows=1000, d=8, dtype="float32", rows_per_chunk=64):
        super().__init__()
        self.n_rows = n_rows
        self.d = d
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.faults = deque()
        self.progress_first = 0
        self.window_rows = 0  # For WINDOW sets: rows that may be sent beyond those released.
        self.released = 0
        self.named = ""  # What it calls its readers; by default, what they ask for.
        self.folder = None  # A set of the same rows, for clients that map it.
        self.nonce = "n0nce"
        self.statistics = []
        self.corpora = {}
        self.uploads = []
        self.end_state = ex_pb.EXTRACTION_STATE_DONE
        self.extraction = self._extraction()

    def _extraction(self):
        recipe = ex_pb.Recipe(context_size=16, batch_size=2, storage_dtype=dtype_pb2.DTYPE_FLOAT32)
        spec = ex_pb.ExtractionSpec(model_id="tiny", corpus_id="docs", hookpoints=[HOOKPOINT], recipe=recipe)
        return ex_pb.Extraction(
            id=EXTRACTION_ID,
            spec=spec,
            set_id="set-1",
            state=ex_pb.EXTRACTION_STATE_DONE,
            n_rows=self.n_rows,
            n_rows_expected=self.n_rows,
            n_rows_exact=True,
            size_bytes=self.n_rows * self.d * 4,
            path="/sets/set-1",
        )

    def column(self, name):
        """All rows of a column."""
        rows = np.arange(self.n_rows, dtype=np.int32)
        if name in PROVENANCE:
            return (rows * (PROVENANCE.index(name) + 1)).astype("<i4")
        values = (rows[:, None] * self.d + np.arange(self.d)).astype("<f4") + (0.5 if name == SECOND else 0.0)
        if self.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype("<u2")
        return values.astype("<f2") if self.dtype == "float16" else values

    def _pb_column(self, name):
        if name in PROVENANCE:
            return service_pb.Column(name=name, dtype=dtype_pb2.DTYPE_INT32, width=1)
        return service_pb.Column(name=name, dtype=dtype_pb2.Dtype.Value(f"DTYPE_{self.dtype.upper()}"), width=self.d)

    def StreamActivations(self, request, context):
        self.note("StreamActivations", request, context)
        fault = self.faults.popleft() if self.faults else Fault("none")
        names = list(request.columns) or [*PROVENANCE, HOOKPOINT]
        if unknown := [name for name in names if name not in (*PROVENANCE, HOOKPOINT, SECOND)]:
            reason, nearest = "HOOKPOINT_NOT_FOUND", {"nearest": HOOKPOINT}
            abort(context, grpc.StatusCode.NOT_FOUND, reason, f"no hookpoint {unknown[0]}", metadata=nearest)
        order = self._order(request)
        end_row = request.end_row or (order.n_places if isinstance(order, Shuffled) else order.n_places(self.n_rows))
        yield self._header(names, request, end_row, fault)
        for _ in range(self.progress_first):
            state = ex_pb.EXTRACTION_STATE_RUNNING
            yield service_pb.StreamActivationsResponse(progress=service_pb.StreamProgress(n_rows=0, state=state))
        yield from self._rows(names, request, order, end_row, fault, context)
        if fault.kind != "no_end":
            end = service_pb.StreamEnd(next_row=end_row, n_rows=self.n_rows)
            yield service_pb.StreamActivationsResponse(end=end)

    def _order(self, request):
        shard = Shard(request.shard_index, request.shard_count or 1)
        block_rows = request.block_rows or 1024
        if request.order == service_pb.READ_ORDER_SHUFFLED:
            numbers = {"n_rows": self.n_rows, "seed": request.seed, "epoch": request.epoch}
            return Shuffled(block_rows=block_rows, shard=shard, **numbers)
        return Sequential(block_rows=block_rows if shard.count > 1 else 1 << 40, shard=shard)

    def _header(self, names, request, end_row, fault):
        mapped = request.transport == service_pb.TRANSPORT_MAPPED and self.folder is not None
        plain = request.order != service_pb.READ_ORDER_SHUFFLED and request.shard_count <= 1
        header = service_pb.StreamHeader(
            set_id="set-2" if fault.kind == "other_set" else "set-1",
            columns=[self._pb_column(name) for name in names],
            first_row=request.start_row,
            end_row=end_row,
            reader=self.named or request.reader,
            statistics=self.statistics,
            path=str(self.folder or "/sets/set-1"),
            transport=service_pb.TRANSPORT_MAPPED if mapped else service_pb.TRANSPORT_INLINE,
            nonce=self.nonce if mapped else "",
            block_rows=0 if plain else request.block_rows or 1024,
        )
        return service_pb.StreamActivationsResponse(header=header)

    def _rows(self, names, request, order, end_row, fault, context):
        mapped = request.transport == service_pb.TRANSPORT_MAPPED and self.folder is not None
        columns = [self.column(name) for name in names]
        row, sent = request.start_row, 0
        while row < end_row:
            if fault.kind in ("cut", "hang", "no_end") and sent == fault.after:
                self._break(fault, context)
                return
            first, together = order.stretch(row)
            stop = min(row + min(self.rows_per_chunk, together), end_row)
            last = first + stop - row
            if self._is_full(stop):
                full = service_pb.StreamProgress(n_rows=first, state=ex_pb.EXTRACTION_STATE_WAITING)
                yield service_pb.StreamActivationsResponse(progress=full)
            while self._is_full(stop) and context.is_active():
                time.sleep(0.005)
            if not (fault.kind == "gap" and sent == fault.after):
                buffers = [memoryview(np.ascontiguousarray(column[first:last])).cast("B") for column in columns]
                place = 0 if request.order != service_pb.READ_ORDER_SHUFFLED and request.shard_count <= 1 else row
                message = frames.encode_chunk(first, stop - row, () if mapped else buffers, place)
                yield service_pb.StreamActivationsResponse.FromString(message)
            sent += 1
            row = row if fault.kind == "overlap" and sent == fault.after else stop

    def _is_full(self, row):
        return self.window_rows and row > self.released + self.window_rows

    def _break(self, fault, context):
        if fault.kind == "cut":
            abort(context, **fault.status)
        while fault.kind == "hang" and context.is_active():
            time.sleep(0.01)

    def ReleaseRows(self, request, context):
        self.note("ReleaseRows", request, context)
        self.released = max(self.released, request.row)
        return service_pb.ReleaseRowsResponse()

    def EstimateExtraction(self, request, context):
        self.note("EstimateExtraction", request, context)
        return service_pb.EstimateExtractionResponse(
            n_rows=10, size_bytes=320, seconds=-1, n_tokens=12, n_rows_cached=4
        )

    def StartExtraction(self, request, context):
        self.note("StartExtraction", request, context)
        self.extraction.spec.CopyFrom(request.spec)
        return service_pb.StartExtractionResponse(extraction=self.extraction)

    def GetExtraction(self, request, context):
        self.note("GetExtraction", request, context)
        self._known(request.extraction_id, context)
        return service_pb.GetExtractionResponse(extraction=self.extraction)

    def ListExtractions(self, request, context):
        self.note("ListExtractions", request, context)
        return service_pb.ListExtractionsResponse(extractions=[self.extraction])

    def CancelExtraction(self, request, context):
        self.note("CancelExtraction", request, context)
        self._known(request.extraction_id, context)
        self.extraction.state = ex_pb.EXTRACTION_STATE_CANCELLED
        return service_pb.CancelExtractionResponse(extraction=self.extraction)

    def _known(self, extraction_id, context):
        if extraction_id != EXTRACTION_ID:
            abort(context, grpc.StatusCode.NOT_FOUND, "EXTRACTION_NOT_FOUND", f"no extraction {extraction_id}")

    def WatchExtraction(self, request, context):
        self.note("WatchExtraction", request, context)
        fault = self.faults.popleft() if self.faults else Fault("none")
        for seq in range(request.after_seq, 6):
            if fault.kind != "none" and seq - request.after_seq == fault.after:
                self._break(fault, context)
            state = ex_pb.Extraction()
            state.CopyFrom(self.extraction)
            state.state = self.end_state if seq == 5 else ex_pb.EXTRACTION_STATE_RUNNING
            state.n_rows = self.n_rows * seq // 5
            yield service_pb.WatchExtractionResponse(seq=seq, extraction=state, snapshot=seq == request.after_seq)

    def ListHookpoints(self, request, context):
        self.note("ListHookpoints", request, context)
        points = [service_pb.Hookpoint(name=SECOND, width=self.d), service_pb.Hookpoint(name=HOOKPOINT, width=self.d)]
        return service_pb.ListHookpointsResponse(hookpoints=points)

    def DecodeTokens(self, request, context):
        self.note("DecodeTokens", request, context)
        return service_pb.DecodeTokensResponse(texts=[f"<{token}>" for token in request.token_ids])

    def UploadCorpus(self, request_iterator, context):
        parts = list(request_iterator)
        self.note("UploadCorpus", parts[0], context)
        content = b"".join(part.content for part in parts[1:])
        self.uploads.append(content)
        if content.startswith(b"{broken"):
            reason, line = "CORPUS_MALFORMED", {"line": "1"}
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, reason, "line 1 is no JSON", metadata=line)
        return corpora_pb.UploadCorpusResponse(corpus=self._keep(parts[0].spec, content.count(b"\n"), len(content)))

    def RegisterCorpus(self, request, context):
        self.note("RegisterCorpus", request, context)
        return corpora_pb.RegisterCorpusResponse(corpus=self._keep(request.spec, 1, request.ByteSize()))

    def _keep(self, spec, n_documents, size_bytes):
        corpus = corpora_pb.Corpus(id=spec.id, digest="d", n_documents=n_documents, size_bytes=size_bytes)
        self.corpora[spec.id] = corpus
        return corpus

    def GetCorpus(self, request, context):
        self.note("GetCorpus", request, context)
        if request.corpus_id not in self.corpora:
            abort(context, grpc.StatusCode.NOT_FOUND, "CORPUS_NOT_FOUND", f"no corpus {request.corpus_id}")
        return corpora_pb.GetCorpusResponse(corpus=self.corpora[request.corpus_id])

    def ListCorpora(self, request, context):
        self.note("ListCorpora", request, context)
        return corpora_pb.ListCorporaResponse(corpora=self.corpora.values())

    def DeleteCorpus(self, request, context):
        self.note("DeleteCorpus", request, context)
        self.corpora.pop(request.corpus_id, None)
        return corpora_pb.DeleteCorpusResponse()


class ScriptedRegistry(
    Scripted,
    models_grpc.ModelServiceServicer,
    residencies_grpc.ResidencyServiceServicer,
    sets_grpc.ActivationSetServiceServicer,
):
    """Models in memory; nodes as told."""

    def __init__(self):
        super().__init__()
        self.models = {}
        self.nodes = []
        self.residencies = []
        self.residency_events = []
        self.set_pins = []
        self.pins = []
        self.page = 2
        self.advice = models_pb.EstimateMemoryResponse(recommended=-1)
        self.catalog = []
        self.script = ["DOWNLOADING", "DOWNLOADING", "READY"]
        self.cut_watch_at = set()

    def add_node(self, node_id, address, state=residency_pb.NODE_STATE_ALIVE):
        device = residency_pb.Device(
            id="cpu", kind=residency_pb.DEVICE_KIND_CPU, name="a CPU", capacity_bytes=8 << 30, free_bytes=4 << 30
        )
        node = residency_pb.Node(id=node_id, address=address, epoch=1, state=state, devices=[device], version="0.1.0")
        node.heartbeat_time.GetCurrentTime()
        self.nodes.append(node)
        return node

    def RegisterModel(self, request, context):
        self.note("RegisterModel", request, context)
        model = request.model
        model.id = model.id or "tiny"
        model.state = model_pb.MODEL_STATE_REGISTERED
        self.models[model.id] = model
        return models_pb.RegisterModelResponse(model=model)

    def _model(self, model_id, context):
        if model_id not in self.models:
            abort(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"no model {model_id}; register it first")
        return self.models[model_id]

    def GetModel(self, request, context):
        self.note("GetModel", request, context)
        return models_pb.GetModelResponse(model=self._model(request.model_id, context))

    def ListModels(self, request, context):
        self.note("ListModels", request, context)
        ids = sorted(self.models)
        at = int(request.page_token or 0)
        token = str(at + self.page) if at + self.page < len(ids) else ""
        page = [self.models[one] for one in ids[at : at + self.page]]
        return models_pb.ListModelsResponse(models=page, next_page_token=token)

    def EstimateMemory(self, request, context):
        self.note("EstimateMemory", request, context)
        self._model(request.model_id, context)
        return self.advice

    def ListCatalog(self, request, context):
        self.note("ListCatalog", request, context)
        at = int(request.page_token or 0)
        token = str(at + self.page) if at + self.page < len(self.catalog) else ""
        return models_pb.ListCatalogResponse(entries=self.catalog[at : at + self.page], next_page_token=token)

    def DeleteModel(self, request, context):
        self.note("DeleteModel", request, context)
        self.models.pop(self._model(request.model_id, context).id)
        return models_pb.DeleteModelResponse()

    def PrepareModel(self, request, context):
        self.note("PrepareModel", request, context)
        return models_pb.PrepareModelResponse(model=self._model(request.model_id, context))

    def WatchModel(self, request, context):
        self.note("WatchModel", request, context)
        model = self._model(request.model_id, context)
        for seq in range(request.after_seq, len(self.script)):
            if seq in self.cut_watch_at:
                self.cut_watch_at.remove(seq)
                abort(context, **unavailable("SHUTTING_DOWN"))
            model.state = model_pb.ModelState.Value(f"MODEL_STATE_{self.script[seq]}")
            if self.script[seq] == "FAILED":
                model.failure.reason, model.failure.message = "HUB_GATED", "accept the terms"
            model.transfer.done_bytes, model.transfer.total_bytes = seq, len(self.script)
            yield models_pb.WatchModelResponse(seq=seq + 1, model=model, snapshot=seq == request.after_seq)
        while context.is_active():
            time.sleep(0.01)

    def ListNodes(self, request, context):
        self.note("ListNodes", request, context)
        return residencies_pb.ListNodesResponse(nodes=self.nodes)

    def ListResidencies(self, request, context):
        self.note("ListResidencies", request, context)
        return residencies_pb.ListResidenciesResponse(residencies=self.residencies)

    def LoadModel(self, request, context):
        self.note("LoadModel", request, context)
        state = residency_pb.RESIDENCY_STATE_LOADING
        one = residency_pb.Residency(id="res-1", model_id=request.model_id, node_id="n1", device_id="cpu", state=state)
        return residencies_pb.LoadModelResponse(residency=one)

    def UnloadModel(self, request, context):
        self.note("UnloadModel", request, context)
        if self.pins and not request.force:
            metadata = {"holders": "", "pin_owners": "anna"}
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE", "pinned by anna", metadata=metadata)
        return residencies_pb.UnloadModelResponse(residencies=self.residencies)

    def PinModel(self, request, context):
        self.note("PinModel", request, context)
        self._model(request.pin.model_id, context)
        request.pin.create_time.GetCurrentTime()
        self.pins.append(request.pin)
        return residencies_pb.PinModelResponse(pin=request.pin)

    def UnpinModel(self, request, context):
        self.note("UnpinModel", request, context)
        self.pins = [pin for pin in self.pins if pin.owner != request.owner]
        return residencies_pb.UnpinModelResponse()

    def ListPins(self, request, context):
        self.note("ListPins", request, context)
        at = int(request.page_token or 0)
        token = str(at + 1) if at + 1 < len(self.pins) else ""
        return residencies_pb.ListPinsResponse(pins=self.pins[at : at + 1], next_page_token=token)

    def WatchResidencies(self, request, context):
        self.note("WatchResidencies", request, context)
        yield residencies_pb.WatchResidenciesResponse(seq=request.after_seq, heartbeat=True)
        for seq, event in enumerate(self.residency_events, 1):
            if seq in self.cut_watch_at:
                self.cut_watch_at.remove(seq)
                abort(context, **unavailable("SHUTTING_DOWN"))
            if seq > request.after_seq:
                yield residencies_pb.WatchResidenciesResponse(seq=seq, residency=event, snapshot=seq == 1)

    def ListActivationSets(self, request, context):
        self.note("ListActivationSets", request, context)
        return sets_pb.ListActivationSetsResponse(sets=[self._set()])

    def GetActivationSet(self, request, context):
        self.note("GetActivationSet", request, context)
        if request.set_id != "set-1":
            abort(context, grpc.StatusCode.NOT_FOUND, "SET_NOT_FOUND", f"no set {request.set_id}")
        return sets_pb.GetActivationSetResponse(sets=[self._set()])

    def PinActivationSet(self, request, context):
        self.note("PinActivationSet", request, context)
        self.set_pins = [pin for pin in self.set_pins if pin.owner != request.owner]
        if not request.HasField("expire_time") or request.expire_time.seconds > time.time():
            end = request.expire_time if request.HasField("expire_time") else None
            pin = sets_pb.SetPin(owner=request.owner, reason=request.reason, expire_time=end)
            self.set_pins.append(pin)
        return sets_pb.PinActivationSetResponse()

    def DeleteActivationSet(self, request, context):
        self.note("DeleteActivationSet", request, context)
        if self.set_pins:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "STATE_CONFLICT", "pinned by ann; unpin it first")
        return sets_pb.DeleteActivationSetResponse()

    def _set(self):
        return sets_pb.ActivationSet(
            pins=self.set_pins,
            holders=["x1"],
            id="set-1",
            node_id="n1",
            model_id="tiny",
            corpus_id="docs",
            columns=[HOOKPOINT],
            n_rows=7,
            retention="RETAIN",
        )


class Host:
    """A scripted servicer behind a port, which it keeps over `stop()` and `start()`."""

    def __init__(self, servicer):
        self.servicer = servicer
        self.port = 0
        self.server = None
        self.start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        pool = futures.ThreadPoolExecutor(max_workers=16)
        self.server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        for kind, add in _ADDERS.items():
            if isinstance(self.servicer, kind):
                add(self.servicer, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self):
        if self.server is not None:
            self.server.stop(0).wait(5)
            self.server = None


_ADDERS = {
    service_grpc.ExtractionServiceServicer: service_grpc.add_ExtractionServiceServicer_to_server,
    corpora_grpc.CorpusServiceServicer: corpora_grpc.add_CorpusServiceServicer_to_server,
    models_grpc.ModelServiceServicer: models_grpc.add_ModelServiceServicer_to_server,
    residencies_grpc.ResidencyServiceServicer: residencies_grpc.add_ResidencyServiceServicer_to_server,
    sets_grpc.ActivationSetServiceServicer: sets_grpc.add_ActivationSetServiceServicer_to_server,
}


@pytest.fixture
def hosts():
    """Starts servers: `hosts(servicer)`; stops them at the end."""
    started = []

    def start(servicer):
        started.append(Host(servicer))
        return started[-1]

    yield start
    for host in started:
        host.stop()


@pytest.fixture
def extractor_host(hosts):
    return hosts(ScriptedExtractor())


@pytest.fixture
def scripted_extractor(extractor_host):
    return extractor_host.servicer


@pytest.fixture
def registry_host(hosts, extractor_host):
    registry = ScriptedRegistry()
    registry.add_node("n1", extractor_host.address)
    return hosts(registry)


@pytest.fixture
def scripted_registry(registry_host):
    return registry_host.servicer


@pytest.fixture
def client(registry_host):
    with HeadraceClient.connect(registry_host.address, deadline_s=5) as one:
        yield one
