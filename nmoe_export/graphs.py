"""A torch module -> one float ONNX graph that computes the same, checked against torch.

Graphs use opset 18 and IR version 8. onnxruntime reads both since 1.14, which runs on JetPack 5 and on every Raspberry
Pi OS.
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

OPSET = 18
IR_VERSION = 8
CHECKED_BATCHES = (1, 7, 32)
MAX_DIFFERENCE = 1e-4
"""The largest absolute difference allowed between torch and onnxruntime; a ResNet18 differs by 4.5e-6."""


def export_graph(module: nn.Module, name: str, example: torch.Tensor) -> bytes:
    """Export `module` for rows shaped like those of `example`, with any number of rows.

    Raises GraphError, which begins with `name`, when torch cannot export it or onnxruntime computes something else.
    """
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
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        raise GraphError(f"{name}: torch cannot export {type(module).__name__}: {_cause(error)}") from error
    if program is None:
        raise GraphError(f"{name}: torch exported nothing")
    data = clean_model(program.model_proto)
    check_answers(module, name, data, example)
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter prints and logs: it warns about its own deprecated parts. Its errors hold what matters."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _cause(error: BaseException) -> str:
    """The first line of an error's root cause, with a hint where there is one."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # takes half a second to import

    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    if isinstance(error, GuardOnDataDependentSymNode):
        reason += "; values cannot decide which code runs: use torch.where"
    return reason


def replace_weights(graph: bytes, module: nn.Module, name: str, example: torch.Tensor) -> bytes | None:
    """The same graph with the weights of another module that is built alike.

    Returns None when the graph's weights do not match the module's by name and shape.
    """
    model = onnx.load_from_string(graph)
    state = module.state_dict()
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


def clean_model(model: onnx.ModelProto) -> bytes:
    """The serialized model without the exporter's name and source paths, in the IR version that old runtimes read."""
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
    """Compare onnxruntime with torch at several batch sizes. Raises GraphError when they differ."""
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
