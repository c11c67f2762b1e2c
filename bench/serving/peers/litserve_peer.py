"""LitServe: one worker with ONNX Runtime. Arguments: model folder, (unused) gRPC port, HTTP port."""

# requires: litserve==0.2.19 onnxruntime

from __future__ import annotations

import sys

import litserve as ls
import numpy as np
import onnxruntime as ort


class Onnx(ls.LitAPI):
    """`{"x": [[...]]}` to `{"y": [[...]]}`."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def setup(self, device: str) -> None:
        """Builds the session."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(f"{self._folder}/model.onnx", options, ["CPUExecutionProvider"])

    def decode_request(self, request: dict) -> np.ndarray:
        """The rows."""
        return np.asarray(request["x"], np.float32)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """y from x."""
        return self._session.run(["y"], {"x": x})[0]

    def encode_response(self, output: np.ndarray) -> dict:
        """Plain lists."""
        return {"y": output.tolist()}


if __name__ == "__main__":
    folder, _, http_port = sys.argv[1:4]
    server = ls.LitServer(Onnx(folder), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(http_port), generate_client_file=False, log_level="error", access_log=False)
