"""BentoML: one worker with ONNX Runtime. Arguments: model folder, (unused) gRPC port, HTTP port."""

# requires: bentoml==1.4.39 onnxruntime

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 30})
class Bench:
    """`{"x": [[...]]}` to the rows of y."""

    def __init__(self) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.environ["BENCH_FOLDER"] + "/model.onnx"
        self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])

    @bentoml.api
    def predict(self, x: list[list[float]]) -> list[list[float]]:
        """y from x."""
        return self._session.run(["y"], {"x": np.asarray(x, np.float32)})[0].tolist()


if __name__ == "__main__":
    folder, _, http_port = sys.argv[1:4]
    os.environ["BENCH_FOLDER"] = folder
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    here = Path(__file__).resolve()
    command = [sys.executable, "-m", "bentoml", "serve", f"{here.stem}:Bench", "--working-dir", str(here.parent)]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", http_port])
