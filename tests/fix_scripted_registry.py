# ruff: noqa: N802 - the methods have the contract's names.
"""A registry with the state that a test gives it, over the generated servicers."""

import time

import grpc

from fix_scripted import Scripted, abort, unavailable
from fix_scripted_extractor import HOOKPOINT
from headrace.registry.v1 import activation_set_service_pb2 as sets_pb
from headrace.registry.v1 import activation_set_service_pb2_grpc as sets_grpc
from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2 as residencies_pb
from headrace.registry.v1 import residency_service_pb2_grpc as residencies_grpc


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
        self.set_nodes = ["n1"]
        self.pins = []
        self.page = 2
        self.advice = models_pb.EstimateMemoryResponse(recommended=-1)
        self.catalog = []
        self.attempts = []
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

    def ValidateModel(self, request, context):
        self.note("ValidateModel", request, context)
        yield models_pb.ValidateModelResponse(attempt=model_pb.ValidationAttempt(passed=True))

    def ListAttempts(self, request, context):
        self.note("ListAttempts", request, context)
        return models_pb.ListAttemptsResponse(attempts=self.attempts)

    def NoteAttempt(self, request, context):
        self.note("NoteAttempt", request, context)
        self.attempts[0].notes = request.notes
        return models_pb.NoteAttemptResponse(attempt=self.attempts[0])

    def AdoptAttempt(self, request, context):
        self.note("AdoptAttempt", request, context)
        model = self._model(self.attempts[0].model_id, context)
        model.load_options.CopyFrom(self.attempts[0].load_options)
        return models_pb.AdoptAttemptResponse(model=model)

    def ListLoadOptions(self, request, context):
        self.note("ListLoadOptions", request, context)
        option = models_pb.LoadOption(
            name="sliding_window", values="tokens, or null", default_value="the config", about="Width.",
            changes_numbers=True,
        )  # fmt: skip
        return models_pb.ListLoadOptionsResponse(options=[option])

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
        ended = (residency_pb.RESIDENCY_STATE_UNLOADED, residency_pb.RESIDENCY_STATE_FAILED)
        listed = [one for one in self.residencies if request.include_ended or one.state not in ended]
        return residencies_pb.ListResidenciesResponse(residencies=listed)

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

    def EvictModels(self, request, context):
        self.note("EvictModels", request, context)
        return residencies_pb.EvictModelsResponse(
            residencies=self.residencies, node_id="n1", device_id="cuda:0", free_bytes=request.free_bytes + 1
        )

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
        return sets_pb.GetActivationSetResponse(sets=[self._set(node) for node in self.set_nodes])

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

    def _set(self, node_id="n1"):
        return sets_pb.ActivationSet(
            pins=self.set_pins,
            holders=["x1"],
            id="set-1",
            node_id=node_id,
            model_id="tiny",
            corpus_id="docs",
            columns=[HOOKPOINT],
            n_rows=7,
            retention="RETAIN",
            identity_json='{"compute_dtype": "float32", "load_options": {}, "model": {"source": "hub a/b"}, '
            '"recipe": {"context_size": 256, "packing": "packed", "drop_first_positions": 0}}',
        )
