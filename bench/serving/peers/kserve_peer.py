"""KServe's Python server with a custom model: ONNX Runtime in its process. Arguments: model folder, gRPC port, HTTP port."""

# requires: kserve==0.21.0 onnxruntime

from __future__ import annotations

import sys

import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Onnx(Model):
    """One session of one thread."""

    def __init__(self, folder: str) -> None:
        super().__init__("bench")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(f"{folder}/model.onnx", options, ["CPUExecutionProvider"])
        self.ready = True

    def predict(self, payload: InferRequest, headers: dict | None = None, response_headers: dict | None = None):
        """y from x."""
        (y,) = self._session.run(["y"], {"x": payload.inputs[0].as_numpy()})
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=payload.from_grpc)
        return InferResponse(response_id=payload.id or "1", model_name="bench", infer_outputs=[output])


folder, grpc_port, http_port = sys.argv[1:4]
del sys.argv[1:]
ModelServer(
    http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_docs_url=False, access_log_format=None
).start([Onnx(folder)])
