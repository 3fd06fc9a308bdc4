# ruff: noqa: N802 - the methods have the contract's names.
"""An extractor with the rows, faults and pauses that a test gives it, over the generated servicer."""

import time
from collections import deque
from dataclasses import dataclass, field

import grpc
import numpy as np

from fix_scripted import Scripted, abort, unavailable
from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.extractor.v1 import corpus_service_pb2_grpc as corpora_grpc
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace_log import frames
from headrace_log.order import Sequential, Shard, Shuffled

HOOKPOINT = "blocks.1.hook_resid_post"

SECOND = "blocks.0.hook_resid_pre"

PROVENANCE = ("token_id", "document", "position")

EXTRACTION_ID = "ex-1"


@dataclass
class Fault:
    """A fault of one connection after `after` chunks.

    `cut` aborts with `status`; `hang` says nothing more; `gap` leaves a chunk out; `overlap` sends a chunk twice;
    `no_end` ends without the end message; `other_set` announces another set.
    """

    kind: str
    after: int = 0
    status: dict = field(default_factory=unavailable)


class ScriptedExtractor(Scripted, service_grpc.ExtractionServiceServicer, corpora_grpc.CorpusServiceServicer):
    """One extraction of `n_rows` rows; their values follow from the row number alone."""

    def __init__(self, n_rows=1000, d=8, dtype="float32", rows_per_chunk=64):
        super().__init__()
        self.n_rows = n_rows
        self.d = d
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.faults = deque()
        self.progress_first = 0
        self.window_rows = 0  # For WINDOW sets: rows that may be sent beyond the released ones.
        self.released = 0
        self.named = ""  # The name it gives to readers; empty for the name they ask for.
        self.folder = None  # A set of the same rows, for clients that map it.
        self.nonce = "n0nce"
        self.statistics = []
        self.corpora = {}
        self.uploads = []
        self.n_damaged = 0
        self.starts_id = EXTRACTION_ID
        self.starts_set = ""  # If given, StartExtraction begins to make this set.
        self.end_state = ex_pb.EXTRACTION_STATE_DONE
        self.answers_before = False  # CancelExtraction answers with the extraction as it was before the call.
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
        if self.starts_set:
            self.extraction.set_id, self.extraction.state = self.starts_set, ex_pb.EXTRACTION_STATE_RUNNING
            self.extraction.id = self.starts_id
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
        before = ex_pb.Extraction()
        before.CopyFrom(self.extraction)
        self.extraction.state = ex_pb.EXTRACTION_STATE_CANCELLED
        return service_pb.CancelExtractionResponse(extraction=before if self.answers_before else self.extraction)

    def _known(self, extraction_id, context):
        if extraction_id != self.extraction.id:
            abort(context, grpc.StatusCode.NOT_FOUND, "EXTRACTION_NOT_FOUND", f"no extraction {extraction_id}")

    def WatchExtraction(self, request, context):
        self.note("WatchExtraction", request, context)
        fault = self.faults.popleft() if self.faults else Fault("none")
        if self.extraction.state == ex_pb.EXTRACTION_STATE_CANCELLED:
            yield service_pb.WatchExtractionResponse(seq=6, extraction=self.extraction, snapshot=True)
            return
        for seq in range(request.after_seq, 6):
            if fault.kind != "none" and seq - request.after_seq == fault.after:
                self._break(fault, context)
            state = ex_pb.Extraction()
            state.CopyFrom(self.extraction)
            state.state = self.end_state if seq == 5 else ex_pb.EXTRACTION_STATE_RUNNING
            state.n_rows = self.n_rows * seq // 5
            yield service_pb.WatchExtractionResponse(seq=seq, extraction=state, snapshot=seq == request.after_seq)

    def VerifySet(self, request, context):
        self.note("VerifySet", request, context)
        yield service_pb.VerifySetResponse(n_files=4, n_files_total=4, n_damaged=self.n_damaged, done=True)

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
