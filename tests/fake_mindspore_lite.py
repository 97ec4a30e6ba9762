"""Stands for the package mindspore_lite, which cannot be installed here: its calls as documented, as strict as it is.

A Model runs its graph in the project's interpreter, with weights from where the file says. What GE calls RefData, the
parameters that a graph writes, belongs to the ModelGroup, by name and in one size.
"""

from __future__ import annotations

import configparser
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from kimi_vl.export import mindir
from kimi_vl.verify.mindir import Interpreter, read_graph
from kimi_vl.verify.mindir.values import name as dtype_name

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "int32": np.int32}


class ModelType(Enum):
    MINDIR = 0
    MINDIR_LITE = 4


class ModelGroupFlag(Enum):
    SHARE_WEIGHT = 1
    SHARE_WORKSPACE = 2


class Context:
    def __init__(self) -> None:
        self.target: list[str] = []
        self.ascend = SimpleNamespace(device_id=0, rank_id=0, provider="", precision_mode="enforce_fp16")


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.name, self.shape, self.dtype, self._data = name, list(shape), np.dtype(dtype), None

    def set_data_from_numpy(self, numpy_obj: np.ndarray) -> None:
        if not isinstance(numpy_obj, np.ndarray):
            raise TypeError(f"numpy_obj must be numpy.ndarray, but got {type(numpy_obj)}.")
        if numpy_obj.dtype != self.dtype:
            raise RuntimeError(
                f"data type not equal! Numpy type: {numpy_obj.dtype}, Tensor type: {self.dtype}"
            )
        if numpy_obj.size != int(np.prod(self.shape)):
            raise RuntimeError("data size not equal!")
        self._data = numpy_obj.copy()

    def get_data_to_numpy(self) -> np.ndarray:
        return self._data


class ModelGroup:
    def __init__(self, flags: ModelGroupFlag = ModelGroupFlag.SHARE_WORKSPACE) -> None:
        self.flags, self.ref_data = flags, {}

    def add_model(self, models: list[Model]) -> None:
        if not isinstance(models, (list, tuple)) or not all(isinstance(m, Model) for m in models):
            raise TypeError("models must be list or tuple of Model")
        for model in models:
            if model.group is not None or model.built:
                raise RuntimeError("model has been in another group, or was built before")
            model.group = self


class Model:
    def __init__(self) -> None:
        self.group: ModelGroup | None = None
        self.built = False

    def build_from_file(
        self,
        model_path: str,
        model_type: ModelType,
        context: Context | None = None,
        config_path: str = "",
        config_dict: dict | None = None,
    ) -> None:
        assert isinstance(model_path, str) and isinstance(config_path, str)
        assert model_type is ModelType.MINDIR and isinstance(context, Context)
        if not (Path(model_path).is_file() and Path(config_path).is_file()):
            raise RuntimeError("build_from_file failed, model_path or config_path does not exist!")
        if [t.lower() for t in context.target] != ["ascend"] or context.ascend.provider != "ge":
            raise RuntimeError("build_from_file failed! only GE on Ascend here")
        options = configparser.ConfigParser(comment_prefixes="#")
        options.read(config_path)
        if options["ascend_context"]["parameter_as_refdata"] not in ("variable", "all"):
            raise RuntimeError("build_from_file failed! caches would not stay")
        if context.ascend.precision_mode != "enforce_origin":
            raise RuntimeError("build_from_file failed! bf16 would become fp16")
        model = mindir.read(Path(model_path))
        places = mindir.pointing(model)
        weights = {}
        for parameter, (shape, dtype) in mindir.parameters(model).items():
            if parameter in places:
                file, offset, length = places[parameter]
                with open(Path(model_path).parent / file, "rb") as f:
                    assert f.read(1) == b"\1"  # the loader takes it for the byte order
                    f.seek(offset)
                    weights[parameter] = np.frombuffer(f.read(length), _DTYPES[dtype]).reshape(shape)
        graph = read_graph(model)
        self._interpreter = Interpreter(graph, weights)
        for written in self._interpreter.parameters.written:
            shape = graph.parameters[written].shape
            held = self.group.ref_data.setdefault(written, np.zeros(shape, np.float32))
            if held.shape != shape:
                raise RuntimeError(f"RefData {written} data size != the size in pre graph")
        self._inputs = {n: Tensor(n, s.shape, _DTYPES[dtype_name(s.dtype)]) for n, s in graph.inputs.items()}
        self.built = True

    def get_inputs(self) -> list[Tensor]:
        return list(self._inputs.values())

    def predict(self, inputs: list[Tensor], outputs: None = None) -> list[Tensor]:
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(t, Tensor) for t in inputs):
            raise TypeError("inputs must be list or tuple of Tensor")
        parameters = self._interpreter.parameters
        for written in parameters.written:
            parameters.write(written, self.group.ref_data[written])
        given = {t.name: t.get_data_to_numpy() for t in inputs}
        results = []
        for name, array in self._interpreter(given).items():
            result = Tensor(name, array.shape, array.dtype)
            result.set_data_from_numpy(array)
            results.append(result)
        for written in parameters.written:
            self.group.ref_data[written] = parameters.read(written)
        return results
