"""Ray Serve: one replica with ONNX Runtime, requests by HTTP. Arguments: model folder, (unused) gRPC port, HTTP port."""

# requires: ray[serve]==2.60.0 onnxruntime

from __future__ import annotations

import signal
import sys

import numpy as np
import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment(num_replicas=1, max_ongoing_requests=256)
class Onnx:
    """`{"x": [[...]]}` to `{"y": [[...]]}`."""

    def __init__(self, folder: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(f"{folder}/model.onnx", options, ["CPUExecutionProvider"])

    async def __call__(self, request: Request) -> JSONResponse:
        """y from x."""
        x = np.asarray((await request.json())["x"], np.float32)
        return JSONResponse({"y": self._session.run(["y"], {"x": x})[0].tolist()})


folder, _, http_port = sys.argv[1:4]
ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(http_port)}, logging_config={"enable_access_log": False})
serve.run(Onnx.bind(folder), name="bench", route_prefix="/predict")
signal.pause()
