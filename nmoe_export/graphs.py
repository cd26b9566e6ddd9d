"""A torch module -> one float ONNX graph that gives its answers.

Opset 18 and IR version 8, which onnxruntime reads since 1.14: JetPack 5 and every Raspberry Pi OS are served.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import onnx
import torch
from torch import nn

from nmoe_edge.errors import ModelError
from nmoe_edge.models import Graph
from nmoe_export.errors import GraphError

OPSET, IR_VERSION = 18, 8
CHECKED_BATCHES = (1, 7, 32)
MAX_DIFFERENCE = 1e-4
"""Between torch and onnxruntime, absolute: a ResNet18 differs by 4.5e-6."""


def export_graph(module: nn.Module, name: str, example: torch.Tensor) -> bytes:
    """The graph of `module`, whose rows are like those of `example`, checked against torch at several batch sizes."""
    rows = torch.export.Dim("rows")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: rows},),
                input_names=["rows"],
                output_names=["out"],
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
        raise GraphError(f"{name}: torch cannot export {type(module).__name__}: {_cause(error)}") from error
    if program is None:
        raise GraphError(f"{name}: torch exported nothing")
    data = cleaned(program.model_proto)
    check_answers(module, name, data, example)
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecated parts and prints what it traced; what matters is in its error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _cause(error: BaseException) -> str:
    """The first line of what an error came of in the end."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # half a second, for an error only

    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    if isinstance(error, GuardOnDataDependentSymNode):
        reason += "; values cannot decide what is computed: use torch.where"
    return reason


def refilled(graph: bytes, module: nn.Module, name: str, example: torch.Tensor) -> bytes | None:
    """The same graph with the weights of another module of the same build; None where its weights cannot be told."""
    model, state = onnx.load_from_string(graph), module.state_dict()
    for tensor in model.graph.initializer:
        weight = state.pop(tensor.name, None)
        if weight is None:
            continue
        array = weight.detach().numpy()
        if list(array.shape) != list(tensor.dims):
            return None
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    if state:
        return None
    data: bytes = model.SerializeToString(deterministic=True)
    check_answers(module, name, data, example)
    return data


def cleaned(model: onnx.ModelProto) -> bytes:
    """Without who made it and where the code stood, and of the IR version that old runtimes read."""
    model.ir_version = IR_VERSION
    model.ClearField("producer_name")
    model.ClearField("producer_version")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def check_answers(module: nn.Module, name: str, data: bytes, example: torch.Tensor) -> None:
    """onnxruntime must say what torch says, for one row and for many."""
    for batch in CHECKED_BATCHES:
        repeats = -(-batch // len(example))
        rows = example.repeat(repeats, *[1] * (example.ndim - 1))[:batch]
        with torch.no_grad():
            expected = module(rows)
        try:
            graph = Graph(name, data, tuple(example.shape[1:]), tuple(expected.shape[1:]))
            difference = float(np.abs(graph(rows.numpy()) - expected.numpy()).max())
        except ModelError as error:
            raise GraphError(str(error)) from error
        if not difference <= MAX_DIFFERENCE:
            raise GraphError(f"{name}: onnxruntime and torch differ by {difference:.2g} at batch {batch}")
