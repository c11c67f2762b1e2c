"""MLServer with a custom runtime: ONNX Runtime in its process, no parallel workers. Arguments: model folder, gRPC port, HTTP port."""

# requires: mlserver==1.7.1 onnxruntime

from __future__ import annotations

import asyncio
import sys

import onnxruntime as ort
from mlserver import MLModel, MLServer
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    """One session of one thread."""

    async def load(self) -> bool:
        """Builds the session."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(self.settings.parameters.uri, options, ["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """y from x."""
        (y,) = self._session.run(["y"], {"x": NumpyCodec.decode_input(payload.inputs[0])})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


async def main(folder: str, grpc_port: str, http_port: str) -> None:
    settings = Settings(
        parallel_workers=0, host="127.0.0.1", grpc_port=int(grpc_port), http_port=int(http_port), metrics_port=int(http_port) + 1,
        metrics_endpoint=None, debug=False, logging_settings=None, use_structured_logging=False,
    )  # fmt: skip
    server = MLServer(settings)
    model = ModelSettings(name="bench", implementation=Onnx, parameters=ModelParameters(uri=f"{folder}/model.onnx"))
    await server.start([model])


asyncio.run(main(*sys.argv[1:4]))
